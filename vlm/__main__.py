"""`python -m vlm` is the same as `vlm`."""

from vlm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
