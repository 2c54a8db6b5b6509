def percent():
    inner = as_number(0, 100)

    @accepts("a percentage from 0 to 100 per cent, such as 12.5 %")
    def convert(value):
        if not value.endswith("%"):
            raise ValueError
        return inner(value[:-1]) / 100

    return convert


def crosscheck(rows, whole, parts):
    return [row["line"] for row in rows if row[whole] != sum(row[p] for p in parts)]


def looks_like_pickle(data):
    return len(data) > 1 and data[0] == 0x80 and 2 <= data[1] <= 5
