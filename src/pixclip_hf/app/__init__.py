"""The demo in a browser: `pixclip-hf app`, and what a Space runs. Needs Gradio (`pip install "pixclip-hf[app]"`)."""

from typing import Any

__all__ = ["launch"]


def launch(model: str, revision: str = "main", mask_model: str | None = None, **options: Any) -> Any:
    """Shows the demo of a model until the process ends.

    Args:
        model: Hub id or folder, as in [`load_encoder`].
        revision: branch, tag or commit of a Hub id.
        mask_model: Hub id or folder of a SAM that makes masks of points, for a model that takes no points.
        options: of `gradio.Blocks.launch`, such as `server_port`.

    Returns:
        The `gradio.Blocks` that was launched.

    Raises:
        ValueError: a model that embeds no regions and texts.
        OSError: no port is free.
    """
    from .demo import load_demo
    from .interface import launch_demo

    return launch_demo(load_demo(model, revision, mask_model), **options)
