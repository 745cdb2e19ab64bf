"""The laws of the benchmark of the main job: both recipes are told, and when each was good."""

import json

from benchmarks import main_job


def test_a_target_is_reached_at_the_first_evaluation_that_has_it():
    curve = [{"updates": updates, "average": average} for updates, average in ((1, 0.7), (2, 0.9), (3, 0.8), (4, 0.9))]
    assert main_job.first(curve, 0.9) == curve[1]
    assert main_job.first(curve, 0.91) is None


def test_the_benchmark_tells_both_recipes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main_job"])
    main_job.main(["--updates=2", "--every=1", "--prompts=1", "--target=0", f"--folder={tmp_path}"])
    found = json.loads((tmp_path / "main_job.json").read_text())
    new, old = (found["curves"][name] for name in ("main job", "former"))
    assert [point["updates"] for point in new] == [point["updates"] for point in old] == [1, 2]
    assert [point["pictures"] for point in new] == [24, 48]
    assert new[1]["forwards"] == 2 * new[0]["forwards"] < old[1]["forwards"]
    assert old[0]["forwards"] == 24 * 8 * (3 + 2)  # a step is trained, and its teacher and the anchor are asked
    assert found["reached"] == {"main job": new[0], "former": old[0]}
    shown = capsys.readouterr().out
    assert "main job" in shown
    assert "former" in shown
