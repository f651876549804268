"""Try a model in the browser: upload an image, type a sentence, see the mask. Needs `pip install 'gradio>=5'`.

    amltrain demo --checkpoint runs/quickstart/best
    amltrain demo --checkpoint runs/baseline/best runs/aml/best

Two checkpoints are shown side by side. The page runs on this machine; --host 0.0.0.0 lets others in the network see it.
"""

import argparse
from collections.abc import Sequence

from amltrain.config.fields import check_number
from amltrain.errors import one_line_errors
from amltrain.run_folder import find_model_folder


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        help="one or two model folders, checkpoint folders or Hub repositories",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port to serve on (default: the first free one from 7860)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        if args.port is not None:
            check_number("--port", args.port, 1, 65535)
        for checkpoint in args.checkpoint:
            find_model_folder(checkpoint, args.revision)  # before the imports
        from amltrain.inference import demo as demo_page  # imports torch

        demo_page.import_gradio()  # before minutes of loading
        contenders = demo_page.load_contenders(args.checkpoint, args.device, args.revision)
        demo_page.launch(demo_page.build_page(contenders), args.host, args.port)
