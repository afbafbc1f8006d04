"""The program fused-lora, also as `python -m fused_lora`."""


def main() -> None:
    """Runs the command line; a machine without its libraries is told what to install."""
    try:
        from fused_lora.cli import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("rich", "typer"):
            raise
        raise SystemExit(f"fused-lora: {missing.name} is not installed: pip install 'fused-lora[cli]'") from None
    app(prog_name="fused-lora")


if __name__ == "__main__":
    main()
