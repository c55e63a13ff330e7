"""What a run is given besides model and SAEs: its prompts, and a chat template if the model's own is not meant."""

from collections.abc import Callable
from pathlib import Path

from refusalscope.inputs import fetch, prompts
from refusalscope.pipeline.options import Options

COMMON_PROMPTS = Path("data/refusal_direction")
"""Where the prompts lie that are used when neither the options nor the preset name any."""


def common_prompts(progress: Callable[[str, int, int], None]) -> Path:
    """The `refusal_direction` collection: where it lies below the working folder, or fetched to there."""
    if not COMMON_PROMPTS.is_dir():
        # Renamed when it is whole, so that an interrupted download is not taken for a collection.
        partly = COMMON_PROMPTS.with_suffix(".partial")
        try:
            fetch.fetch(COMMON_PROMPTS.name, partly, progress=progress)
        except ValueError as error:
            raise ValueError(f"{error}; or name prompts of your own with --prompts") from error
        partly.rename(COMMON_PROMPTS)
    return COMMON_PROMPTS


def load_prompts(options: Options, path: Path | None) -> prompts.PromptSets:
    """The prompts of a file or folder, or the testbed's if None, as the options restrict them."""
    sets = _all_prompts(options, path)
    if options.sizes is not None:
        swept = options.limit or (150 if path is None else 100)
        sets = prompts.widened(sets, _all_prompts(options, path, validation=swept).fitting)
    if options.datasets is not None:
        sets = prompts.only(sets, options.datasets)
    return prompts.for_paper(sets) if options.protocol == "paper" else sets


def read_template(path: Path | None) -> str | None:
    """A chat template's text. Raises ValueError, one line, when the file cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template {path} is not UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"--chat-template {path} cannot be read: {error.strerror}") from error


def _all_prompts(options: Options, path: Path | None, *, validation: int | None = None) -> prompts.PromptSets:
    count = options.limit or (150 if path is None else 100)  # of real sets the first 100, as published
    if path is None:
        fewer = options.limit or prompts.TRAIN_COUNT
        return prompts.from_testbed(
            count=count,
            full=options.full,
            train=min(prompts.TRAIN_COUNT, max(32, fewer)),
            validation=validation or min(prompts.VALIDATION_COUNT, max(16, fewer)),
        )
    held = validation or prompts.VALIDATION_COUNT
    if path.is_dir():
        published = options.protocol == "paper"
        return prompts.from_refusal_direction(path, count=count, published_draw=published, validation=held)
    return prompts.from_file(path, columns=options.columns, label=options.label, count=count, validation=held)
