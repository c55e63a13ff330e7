"""The entry point: signals are obeyed before anything that takes its time is imported."""

from refusalscope.core import interrupt

LAST_WORDS = "stopped: what is done is kept; the same command goes on from here"


def main() -> None:
    """Run the command line."""
    with interrupt.obeyed(LAST_WORDS):
        from refusalscope.cli import app

        app()


if __name__ == "__main__":
    main()
