"""The law of loggers: whichever a run has, it gets configuration, numbers, pictures and tables; metrics.csv is kept."""

import json
from pathlib import Path

import pytest
import tiny
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowopd.cli.run import _loggers
from flowopd.teachers import LoRATeacher
from flowopd.training import ImageGrid, OPDStudent, ResultsTable, RewardCallback, TeacherCallback
from flowopd.training.callbacks.folder import RunFolder
from flowopd.training.callbacks.log import MetricsFile
from flowopd.training.callbacks.start import StartScores

SETTINGS = {"model": "OPDStudent", "model.lora.rank": 4, "data.prompts.red": ["a", 1], "trainer.strategy": None}


def fit(pipeline, folder: Path, logger) -> Path:
    """A fit that shows all that it has to show; returns its folder."""
    expert = tiny.expert(folder / "expert", pipeline)
    run = RunFolder(
        folder / "run",
        write_config=lambda path: path.write_text("model: OPDStudent\n") and None,
        loggers=lambda place, steps: _loggers(place, steps, [logger]),
        settings=SETTINGS,
    )
    shown = [ImageGrid(prompts_per_task=2), ResultsTable(), StartScores()]
    signals = [TeacherCallback(["red"], LoRATeacher(expert)), RewardCallback("red", tiny.Brightness())]
    policy = tiny.policy(OPDStudent, pipeline, start=expert)
    trainer = tiny.trainer(folder / "run", [run, *signals, *shown], 1, limit_val_batches=1.0, log_every_n_steps=1)
    trainer.fit(policy, tiny.data())
    assert (folder / "run" / "metrics.csv").read_text().startswith("distill/loss,")
    assert isinstance(trainer.loggers[0], MetricsFile)
    return folder / "run"


def test_tensorboard_gets_all_of_it(tiny_pipeline, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="events", default_hp_metric=False)
    fit(tiny_pipeline, tmp_path, logger)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = events.Tags()
    assert {"images/student", "images/base", "images/teacher-red"} <= set(tags["images"])
    assert {"val/red", "distill/loss"} <= set(tags["scalars"])
    assert events.Scalars("val/red")[0].step == 0
    assert any(tag.startswith("results") for tag in tags["tensors"])
    assert "model.lora.rank: 4" in (tmp_path / "events" / "hparams.yaml").read_text()


@pytest.mark.filterwarnings("ignore")  # of what it stands on
def test_mlflow_gets_all_of_it(tiny_pipeline, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    place = f"sqlite:///{tmp_path}/mlflow.db"
    logger = MLFlowLogger("tiny", tracking_uri=place, artifact_location=str(tmp_path / "artifacts"))
    fit(tiny_pipeline, tmp_path, logger)
    client = mlflow.MlflowClient(place)
    run = client.get_run(logger.run_id)
    assert run.data.params["model.lora.rank"] == "4"
    assert {"val/red", "distill/loss"} <= run.data.metrics.keys()
    assert client.get_metric_history(logger.run_id, "val/red")[0].step == 0
    kept = {one.path for folder in (None, "images") for one in client.list_artifacts(logger.run_id, folder)}
    assert {"config.yaml", "results.md", "images/models.png", "images/iteration_00000.png"} <= kept


@pytest.mark.filterwarnings("ignore")  # of what it stands on
def test_wandb_gets_all_of_it(tiny_pipeline, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    logger = WandbLogger(project="tiny", offline=True, save_dir=tmp_path)
    try:
        fit(tiny_pipeline, tmp_path, logger)
        assert logger.experiment.config["model.lora.rank"] == 4
        summary = dict(logger.experiment.summary)
        assert {"val/red", "distill/loss"} <= summary.keys()
    finally:
        wandb.finish()
    (files,) = tmp_path.glob("wandb/offline-run-*/files")
    pictures = {path.name.partition("_")[0] for path in files.rglob("*.png")}
    assert {"student", "base", "teacher-red"} <= pictures
    (results,) = files.glob("media/table/results_*.json")
    content = json.loads(results.read_text())
    assert content["columns"][:2] == ["model", "guidance"]
    assert [row[0] for row in content["data"]] == ["base", "teacher-red", "cold-start", "student"]
