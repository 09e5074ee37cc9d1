"""Stage `synth`: seeds and templates, perhaps an endpoint, become conversations to learn from.

Enters: a recipe. Leaves: an artifact of kind data, see `output`. A run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from microlm.core.artifact import Workspace, stage
from microlm.core.endpoint import read_key
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.text.synth.bulk import REFUSED, Asker, Bulk
from microlm.text.synth.endpoint import BulkClient, Passing
from microlm.text.synth.items import Item
from microlm.text.synth.journal import Answer, Journal
from microlm.text.synth.output import Writer
from microlm.text.synth.plan import Plan
from microlm.text.synth.recipe import Endpoint, SynthRecipe
from microlm.text.synth.seeds import source_of

__all__ = ["SynthRecipe", "run"]


def fingerprint(recipe: SynthRecipe) -> dict[str, Any]:
    """The seeds' bytes; inside an artifact its key stands for them, and the name is left."""
    if recipe.data is not None:
        return {"seeds": recipe.seeds}
    source = source_of(recipe)
    return {"seeds": source.fingerprint() if source else None}


@stage("synth", "data", version=3, fingerprint=fingerprint)
def run(recipe: SynthRecipe, work: Workspace) -> None:
    """Ask what is not answered yet, then write everything in the order of the plan."""
    plan = Plan(recipe)
    with Journal(work.resume / "journal.jsonl") as journal:
        refused = ask_all(plan, recipe.endpoint, journal) if recipe.endpoint else {}
        with Writer(work, plan) as writer:
            for item in plan:
                writer.write(item, journal.get(item.number) or refused.get(item.number))
    writer.finish()


def ask_all(plan: Plan, endpoint: Endpoint, journal: Journal) -> dict[int, Answer]:
    """Fill the journal; the refusals are not in it, so that a later run asks them again."""
    refused: dict[int, Answer] = {}
    total = sum(isinstance(i, Item) and i.template.answer is None for i in plan)
    if journal.count >= total:
        return refused
    key = read_key(Path(endpoint.api_key_file) if endpoint.api_key_file else None)
    client = BulkClient(endpoint.url, key, endpoint.timeout_s)
    with ExitStack() as stack:
        stack.enter_context(client)
        asker = Asker(plan.recipe, endpoint, client, _model(client, endpoint, journal.models))

        def ask(item: Item) -> Answer:
            answer = asker.ask(item)
            if not answer.reason.startswith(REFUSED):
                journal.add(item.number, answer)
            return answer

        bar = stack.enter_context(Progress("synth", total, "answers"))
        bar.update(journal.count)
        bulk = stack.enter_context(Bulk(ask, asker.limiter, endpoint.concurrency))
        unfit, in_a_row = 0, 0
        try:
            for item, answer in bulk.answers(_open_items(plan, journal)):
                in_a_row = in_a_row + 1 if answer.reason.startswith(REFUSED) else 0
                if in_a_row:
                    refused[item.number] = answer
                if in_a_row == endpoint.max_refusals:
                    raise UserError(f"{in_a_row} requests in a row were refused; the last: {answer.detail}")
                unfit += bool(answer.reason)
                bar.update(1, unfit=str(unfit))
        except KeyboardInterrupt:
            bar.update(0, stopping="answers under way are waited for; Ctrl-C again leaves at once")
            raise
    return refused


def _open_items(plan: Plan, journal: Journal) -> Iterator[Item]:
    for item in plan:
        if isinstance(item, Item) and item.template.answer is None and item.number not in journal:
            yield item


def _model(client: BulkClient, endpoint: Endpoint, before: set[str]) -> str:
    """The model to ask: the one that the answers of an earlier run came from, if there was one."""
    try:
        model = endpoint.model or client.default_model()
    except Passing as e:
        raise UserError(str(e)) from None
    if before - {model}:
        asked = ", ".join(sorted(before))
        raise UserError(
            f"{endpoint.url}: serves '{model}', the earlier answers of this run are of '{asked}'; "
            "serve that again, or name a model in endpoint.model"
        )
    return model
