"""`python -m vlm` is the same as `vlm`."""

from vlm.cli.main import enter

if __name__ == "__main__":
    enter()
