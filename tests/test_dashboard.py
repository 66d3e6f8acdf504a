"""dashboard.py: every panel charts a metric that runs write, and saving sends the workspace."""
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import TINY, Fork, command, environment, flags, records

import dashboard
from script import UserError

# wandb-workspaces uses validators of pydantic's first version.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def set_cpu_peak():
    """Give the CPU a peak, since runs log mfu only on devices with a known peak."""
    import device
    device.peak_flops = lambda device, dtype: 1e12


@pytest.fixture(scope="module")
def written(tiny_data, tmp_path_factory):
    """The keys of a real run's metrics.jsonl."""
    folder = tmp_path_factory.mktemp("dashboard")
    knobs = {**TINY, "dataset": tiny_data, "out_dir": folder / "run", "max_iters": 10,
             "target_win_rate": 0.3}   # without it rho is constant and not written
    output = folder / "output"
    assert Fork("train.py", flags(**knobs), output, output, set_cpu_peak).end() == 0, (
        output.read_text())
    return set().union(*records(folder / "run", "iter"))


def panels(spec):
    """(x, y, title, largest y) of every panel, from the JSON that wandb gets."""
    for section in spec["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            config = panel["config"]
            yield config["xAxis"], config["metrics"], config["chartTitle"], config.get("yAxisMax")


def check(spec, written):
    found = list(panels(spec))
    shown = {(x, metric) for x, metrics, _, _ in found for metric in metrics}
    assert {name for pair in shown for name in pair} <= written
    assert shown >= {("iter", "val/loss"), ("tokens", "val/loss"), ("hours", "val/loss")} | {
        ("iter", name) for name in (
            "train/loss", "train/win_rate", "train/rho", "lr", "grad_norm", "train/clip_rate",
            "param_norm", "momentum_norm", "hessian_norm", "tokens_per_sec", "mfu")}
    assert [(title, top) for _, metrics, title, top in found if metrics == ["train/win_rate"]] == [
        ("train/win_rate: share of coordinates not clipped; healthy: 0.1 to 0.5", 1)]
    section = spec["section"]
    assert section["runSets"][0]["grouping"] == [{"section": "config", "name": "optimizer.value"}]
    # Each run is a line of its own colour: none is set, and no panel shows a group's mean.
    assert section["customRunColors"] == {}
    settings = [section["settings"]] + [
        s["localPanelSettings"] for s in section["panelBankConfig"]["sections"]]
    assert not any(s["useRunsTableGroupingInPanels"] for s in settings)


def test_panels_chart_metrics_that_a_run_writes(written):
    model = dashboard.build_workspace("me", "my-project")._to_model()
    assert (model.entity, model.project) == ("me", "my-project")
    check(json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)), written)


def save(tmp_path, *words, **env):
    """Run the script without an account, except what env provides."""
    clean = {k: v for k, v in environment(HOME=str(tmp_path)).items() if not k.startswith("WANDB_")}
    return subprocess.run(command("dashboard.py", *words), env={**clean, **env}, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=120)


class Server(BaseHTTPRequestHandler):
    """Answers like wandb's for the account 'me', which has one project."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {}
        if self.path == "/graphql":
            request = json.loads(body)
            answer = {"data": {"viewer": {
                "id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}",
                "teams": {"edges": []}}}}
            if "upsertView" in request["query"]:
                self.server.saved.append(request["variables"])
                answer = {"data": {"upsertView": {"view": {"id": "2", "name": "nw-x-v"},
                                                  "inserted": True}}}
                if request["variables"]["projectName"] != "sophia-gpt2":
                    answer = {"data": None, "errors": [{"message": "project not found"}]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_saving_sends_the_workspace(tmp_path, written):
    server = HTTPServer(("127.0.0.1", 0), Server)
    server.saved = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    account = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
               "WANDB_API_KEY": "0" * 40}
    done = save(tmp_path, **account)
    assert done.returncode == 0 and "me/sophia-gpt2?nw=x" in done.stderr, done.stderr
    assert [server.saved[0][name] for name in ("entityName", "projectName", "type")] == [
        "me", "sophia-gpt2", "project-view"]
    check(json.loads(server.saved[0]["spec"]), written)
    refused = save(tmp_path, "--project=other", **account)
    server.shutdown()
    assert refused.returncode == 2 and "project not found" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_without_an_account_the_error_is_one_line(tmp_path):
    done = save(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("dashboard.py: error: cannot save the workspace: No API key")
    assert "wandb login" in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.workspaces", raising=False)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.reports.v2", raising=False)
    with pytest.raises(UserError, match="pip install wandb wandb-workspaces"):
        dashboard.build_workspace("me", "my-project")
