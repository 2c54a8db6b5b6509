"`python -m mmemo ...` is the command `mmemo ...`."

from .cli import app

if __name__ == "__main__":
    app(prog_name="mmemo")
