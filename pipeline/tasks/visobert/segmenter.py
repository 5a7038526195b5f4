"""Word segmentation: joining the syllables of a Vietnamese word by `_`, as in `điện_thoại có pin tốt`.

PhoBERT (Nguyen & Nguyen 2020) was pretrained on segmented texts. ViSoBERT was not.
"""

from collections.abc import Callable

from pipeline.errors import UserError


def load_segmenter(name: str) -> Callable[[str], str]:
    """Load the function that segments a text. `name`: `pyvi`.

    Raises:
        UserError: its package is not installed.
    """
    try:
        from pyvi.ViTokenizer import tokenize
    except ImportError:
        raise UserError(
            f"model.segmenter {name}: {name} is not installed; install it with `pip install --editable '.[segmenter]'`"
        ) from None
    segment: Callable[[str], str] = tokenize
    return segment
