"""A Trainer that shares a distiller on the Hub while it trains and when it is done: the distiller, and no more."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from mend_hf import __version__
from mend_hf.cards import CARD_NAME, CardFacts, as_list
from mend_hf.hub import DISTILLER_NAMES, push_distiller_folder
from mend_hf.model import MendModel
from mend_hf.watched import WatchedTrainer


class PushingTrainer(WatchedTrainer):
    """`WatchedTrainer` whose `push_to_hub`, `hub_strategy` and cards are those of a distiller.

    `hub_strategy="end"` and `"every_save"` push the distiller and its card; `"checkpoint"` and `"all_checkpoints"`
    also the folders to go on from, with the optimizer's states. A bare language model is pushed as transformers does.
    """

    hub_model_id: str | None
    push_in_progress: PushInProgress | None

    @cached_property
    def _api(self) -> HfApi:
        """The Hub's client; what it does in the background it does in order."""
        return HfApi(library_name="mend_hf", library_version=__version__)

    @property
    def _has_distiller(self) -> bool:
        return isinstance(self.accelerator.unwrap_model(self.model), MendModel)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the distiller's card into the output folder; takes what `push_to_hub` takes for it."""
        if not self._has_distiller:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            facts = make_facts(*args, **kwargs)
            self.accelerator.unwrap_model(self.model).save_pretrained(self.args.output_dir, facts=facts)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save the distiller and upload it to `args.hub_model_id`.

        Args:
            commit_message: Of the commit.
            blocking: Wait until it is there.
            token: None: `args.hub_token`.
            revision: Branch; None: `args.hub_revision`.
            private: Whether a repository that is made for this is private; None: `args.hub_private_repo`.
            **card: `language`, `license`, `tags`, `dataset` for the card.

        Returns:
            A `CommitInfo`; without `blocking`, a `Future` of one; in processes other than the first, None.

        Raises:
            HubError: The Hub refuses, or cannot be reached.
        """
        if not self._has_distiller:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **card)
        tags = as_list(card.pop("tags", None))
        facts = make_facts(**card)
        token = token or self.args.hub_token
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        if self.push_in_progress is not None:
            _report_failed(self.push_in_progress)
        job = self._start_push(
            Path(self.args.output_dir),
            facts=facts,
            commit_message=commit_message,
            token=token,
            revision=revision or self.args.hub_revision,
            tags=tags,
        )
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint once it is in its place, as `hub_strategy` says, while the training goes on."""
        if not self._has_distiller:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        strategy = self.args.hub_strategy
        if self._staging is not None or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.push_in_progress is None:
            self.push_in_progress = PushInProgress([])
        if not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        _report_failed(self.push_in_progress)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        common = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        message = f"Training in progress, step {self.state.global_step}"
        jobs: list[Future[Any]] = [self._start_push(Path(checkpoint_folder), commit_message=message, **common)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = strategy == HubStrategy.CHECKPOINT
            upload = partial(
                self._api.upload_folder,
                repo_id=self.hub_model_id,
                path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                **common,
            )
            jobs.append(self._run_on_copy(lambda folder: upload(folder_path=folder), Path(checkpoint_folder), None))
        self.push_in_progress.jobs.extend(jobs)

    def _start_push(self, folder: Path, **options: Any) -> Future[Any]:
        push = partial(push_distiller_folder, repo_id=str(self.hub_model_id), **options)
        return self._run_on_copy(push, folder, (*DISTILLER_NAMES, CARD_NAME))

    def _run_on_copy(self, work: Callable[[str], Any], folder: Path, names: Sequence[str] | None) -> Future[Any]:
        """Work in the background on a copy of a folder's files: checkpoints are deleted and written anew meanwhile."""
        copy = Path(tempfile.mkdtemp())
        for path in folder.iterdir():
            if path.is_file() and (names is None or path.name in names):
                shutil.copyfile(path, copy / path.name)
        job: Future[Any] = self._api.run_as_future(work, str(copy))
        job.add_done_callback(lambda _: shutil.rmtree(copy, ignore_errors=True))
        return job


def make_facts(
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
) -> CardFacts:
    """Return a card's facts from the arguments of transformers' `create_model_card`.

    Args:
        language: One code or several.
        license: As the Hub spells it.
        dataset: Names of the training data.
        dataset_tags: Their Hub ids, in place of names.
        model_name: Accepted, and of no use: the card is named after the base model.
    """
    del model_name
    return CardFacts(language=as_list(language), license=license, datasets=as_list(dataset_tags or dataset))


def _report_failed(push: PushInProgress) -> None:
    """Warn of pushes in the background that failed: the training is worth more than any of them."""
    for job in push.jobs:
        if job.done() and (error := job.exception()) is not None:
            warnings.warn(f"A checkpoint did not reach the Hub, the training goes on: {error}", stacklevel=3)
    push.jobs = [job for job in push.jobs if not job.done()]
