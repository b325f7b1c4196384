"""The rival: eager torch behind FastAPI as one writes it in a day.

    python -m benchmarks.serve.rivals RUN MODEL --port PORT

The server has the visual vectors in a dict, made once, ID rows in memory, and the trainer's model in eager mode;
requests and answers are those of the scorer, but that unknown and missing values are not reported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer

from featurestore.console.commandline import CommandApp, run_app
from trainer.comm import SoloComm
from trainer.exchange.vectors import FieldVectors
from trainer.runs.saved import open_trained
from trainer.schema.fields import Field

if TYPE_CHECKING:
    from fastapi import FastAPI

app = CommandApp()


def _values(request: Mapping[str, Any], field: Field) -> Any:
    value = request["user" if field.side == "user" else "candidates"][field.column_name]
    return value if isinstance(value, list) else [value]


@app.command()
def fastapi(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    model: Annotated[Path, typer.Argument(help="Folder of the run's published model, for its tables and vectors.")],
    port: Annotated[int, typer.Option()],
) -> None:
    """Answer requests by eager torch behind FastAPI."""
    import uvicorn

    torch.set_num_threads(1)
    uvicorn.run(_fastapi_app(EagerModel(run, model)), port=port, log_level="warning", loop="uvloop", http="httptools")


class EagerModel:
    """The trainer's model, its ID rows in memory, and a dict of visual vectors."""

    def __init__(self, run: Path, model: Path) -> None:
        from featurestore.store import FeatureStore
        from serving.bundle.open import Bundle

        opened = open_trained(run, SoloComm())
        self._network, self._bundle = opened.engine.model.eval(), Bundle.open(str(model))
        self._vectors: dict[int, Any] = {}
        for name, table in self._bundle.vectors.items():
            keys_N = FeatureStore.open(opened.stores[name].url).snapshot().keys()
            vectors_NV, _ = table.lookup(keys_N)
            self._vectors |= dict(zip(keys_N.tolist(), vectors_NV, strict=True))
        self._width = len(next(iter(self._vectors.values()), ()))
        opened.close()

    @torch.inference_mode()
    def score(self, request: Mapping[str, Any]) -> list[float]:
        """Return the probabilities of all candidates."""
        num, vectors = len(next(iter(request["candidates"].values()))), {}
        for field in self._network.fields:
            values = _values(request, field)
            if field.is_id:
                ids_N = np.array(values, np.int64)
                rows_N, _ = self._bundle.ids.find([field.table_name], ids_N, np.array([len(ids_N)]))
                rows_NV = self._bundle.ids.gather(self._bundle.model.id_width, rows_N)
            else:
                nothing = np.zeros(self._width, np.float32)
                rows_NV = np.stack([self._vectors.get(key, nothing) for key in values] or [nothing])[: len(values)]
            lengths_M = torch.tensor([len(values)]) if field.side == "user" else torch.ones(num, dtype=torch.int64)
            vectors[field.name] = FieldVectors(torch.from_numpy(rows_NV), torch.arange(len(values)), lengths_M)
        logits_B: torch.Tensor = self._network(vectors, {}, torch.zeros(num, dtype=torch.int64))
        scores: list[float] = torch.sigmoid(logits_B).tolist()
        return scores


def _fastapi_app(model: EagerModel) -> "FastAPI":
    from fastapi import FastAPI
    from pydantic import BaseModel

    class ScoreRequest(BaseModel):
        """The body of a request: a user, and the columns of the candidates."""

        user: dict[str, int | list[int]]
        candidates: dict[str, list[int]]

    api = FastAPI()

    @api.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @api.post("/v1/score")
    async def score(request: ScoreRequest) -> dict[str, list[float]]:
        return {"scores": model.score({"user": request.user, "candidates": request.candidates})}

    return api


if __name__ == "__main__":
    run_app(app)
