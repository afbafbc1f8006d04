"""The program fused-lora, also as `python -m fused_lora`."""


def main() -> None:
    """Runs the command line; a machine without its libraries is told what to install."""
    try:
        from fused_lora.cli import app
    except ModuleNotFoundError as missing:
        library = str(missing.name).split(".")[0]
        if library not in ("rich", "typer"):
            raise
        raise SystemExit(f"fused-lora: {library} is not installed: pip install 'fused-lora[cli]'") from None
    app(prog_name="fused-lora")


if __name__ == "__main__":
    main()
