"""The stage `verify`. Enters: a model artifact; leaves: a verdict on `microlm serve` with it."""

from __future__ import annotations

from microlm.core.artifact import Workspace, stage
from microlm.core.client import Client
from microlm.core.recipe import StageRecipe, artifact_input, unkeyed
from microlm.eval.verify import verdict
from microlm.eval.verify.smoke import SMOKE
from microlm.serve.launch import ServerProcess


class VerifyRecipe(StageRecipe):
    """What is served and how long we wait for it."""

    model: str = artifact_input(kinds=("model",), description="the model artifact to serve")
    start_timeout_s: float = unkeyed(180.0, gt=0, description="limit for the server's start")
    request_timeout_s: float = unkeyed(120.0, gt=0, description="limit of each request")


@stage("verify", "verdict", 2)
def run(recipe: VerifyRecipe, work: Workspace) -> None:
    """Serve the model, run the smoke checks over HTTP, write the verdict, fail when a line failed.

    Our server offers all that is checked; a small model may be unable to show it.
    """
    directory = work.inputs["model"].path
    with (
        ServerProcess(directory, timeout_s=recipe.start_timeout_s, log=work.logs / "server.log") as server,
        Client(server.url, timeout_s=recipe.request_timeout_s) as client,
    ):
        result = verdict.judge(client, SMOKE)
    verdict.write(result, work.logs)
    work.write_json("verdict.json", result.lasting())
    work.metrics["checks"] = len(result.checks)
    work.metrics["passed"] = result.count("pass")
    verdict.require_passed(result, work.logs / "verdict.html", refused=("fail", "not_offered"))
