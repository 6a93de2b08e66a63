"""A sweep by a launcher that starts processes (group `launchers`): two jobs at a time, each in its own folder."""

import pytest
from runs import in_shell, one_source
from test_sweeps import sweep_of

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")


def test_two_jobs_at_a_time_find_all_they_need_and_share_a_table_in_which_none_is_lost(data, tmp_path):
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "command=all", "run=pair", *one_source(data)]
    told, code = in_shell(*words, f"split.out_dir={tmp_path}/splits", "moco.margin=0,0.1,2,0.2", cwd=tmp_path)
    assert code == 1
    assert "Traceback" not in told
    assert "moco.margin-2 failed: moco.margin=2.0: must be <= 1" in told
    assert told.strip().splitlines()[-1] == "sniperface: moco.margin=2.0: must be <= 1"
    found = {path.name for path in (tmp_path / "runs" / "pair").iterdir() if path.is_dir()}
    assert found == {f"moco.margin-{margin}" for margin in ("0", "0.1", "0.2", "2")}
    states = {row["moco.margin"]: row["state"] for row in sweep_of(tmp_path / "runs" / "pair")}
    assert states == dict.fromkeys(("0.0", "0.1", "0.2"), "epoch 1 of 2, measured") | {"2": "not trained, see its log.txt"}
