import xml.etree.ElementTree as ET


def boxes_of(svg):
    return sum(
        rect.get("stroke") is not None
        for rect in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
    )


def width_needed(head, lines):
    widths = [max(map(len, column)) for column in zip(head, *(line.cells for line in lines))]
    return sum(widths) + 2 * (len(widths) - 1)


def share_bar(value, largest, width):
    return ("█" * round(value / largest * width)).ljust(width)
