def takes_parameters(path):
    cells = nbformat.read(path, 4).cells
    return any("parameters" in cell.metadata.get("tags", ()) for cell in cells)
