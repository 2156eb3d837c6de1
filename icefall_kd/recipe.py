"""What a recipe imports that a former version of icefall_kd plugged.

Such a recipe ends with one sentence that tells how to plug it again.
"""

from typing import Any

from icefall_kd.errors import KDError, install_excepthook


def __getattr__(name: str) -> Any:
    install_excepthook()
    raise KDError(
        "this recipe has the lines of a former version of icefall_kd, which import "
        f"{__name__}: run `icefall-kd plug --undo FOLDER` on the recipe's "
        "folder, then `icefall-kd plug ORIGINAL FOLDER` again"
    )
