import os
from pathlib import Path


def whole_or_nothing(path, text):
    part = Path(path).with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
