"""cluster-configs/: each file against Ray's own validator, or a list of the fields that its reader
has; the shell scripts as they run, with stand-ins for what is not here."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from hamdist.launch.cluster_file import ClusterSettings, read_cluster
from hamdist.launch.local_cluster import HEALTH

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster-configs"
RAY_UP = ["on-premise", "raspberry-pi", "aws", "gcp"]
SITE = ("amazonaws", "googleapis.com/v1/projects/", "/home/", "/root")


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_every_file_says_how_it_was_verified_and_names_no_site(path):
    text = path.read_text()
    header = [json.loads(text)["description"]] if path.suffix == ".json" else []
    for line in text.splitlines():
        if line.startswith("#!"):
            continue
        if not line.startswith("#"):
            break
        header.append(line)
    assert any(line.startswith("# Verified: 20") for line in header)
    assert not [word for word in SITE if word in text]


def test_ray_is_told_the_same_everywhere():
    lines = (FOLDER / "ray.env").read_text().splitlines()
    told = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert told == HEALTH
    for name in [*(f"{n}.yaml" for n in RAY_UP), "one-machine.sh", "slurm.sbatch"]:
        text = (FOLDER / name).read_text()
        assert "ray.env" in text, name
        assert "RAY_AUTH_MODE=token" in text, name
    for name in ("kubernetes-cluster", "kubernetes-job"):
        assert "--from-env-file=cluster-configs/ray.env" in (FOLDER / f"{name}.yaml").read_text()


def test_the_example_of_a_cluster_file(tmp_path):
    raw = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
    assert set(raw) == set(ClusterSettings.model_fields)
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**raw, "token": str(token)}))
    assert read_cluster(tmp_path / "c.yaml").jobs == "http://127.0.0.1:8265"


@pytest.mark.parametrize("name", RAY_UP)
def test_rays_validator_takes_it(name, tmp_path, monkeypatch):
    """As `ray up` does before it calls a cloud. (The local provider keeps a file of its state.)"""
    pytest.importorskip("jsonschema", reason="Ray's validator needs jsonschema")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    from ray.autoscaler._private.util import prepare_config, validate_config

    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    ready = prepare_config(raw)
    validate_config(ready)
    types = ready["available_node_types"]
    assert ready["head_node_type"] in types
    hosts = len(raw["provider"].get("worker_ips", [0, 0]))
    assert sum(t["min_workers"] for t in types.values()) == hosts
    with pytest.raises(Exception, match="worker_ports"):
        validate_config({**ready, "worker_ports": 1})


# The fields of KubeRay's API (v1) that we use, and of Kubernetes' pods; `str`: text, `"int"`: a
# quantity or a number in quotes, which Kubernetes insists on.
CONTAINER = {
    "name": str,
    "image": str,
    "envFrom": [{"configMapRef": {"name": str}}],
    "ports": [{"containerPort": int, "name": str}],
    "resources": {"requests": {"cpu": str, "memory": str}, "limits": {"cpu": str, "memory": str}},
    "volumeMounts": [{"mountPath": str, "name": str}],
}
VOLUME = {
    "name": str,
    "emptyDir": {"medium": str, "sizeLimit": str},
    "configMap": {"name": str},
    "persistentVolumeClaim": {"claimName": str},
}
TEMPLATE = {"spec": {"containers": [CONTAINER], "volumes": [VOLUME]}}
START = {"dashboard-host": str, "num-cpus": str}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "headGroupSpec": {"rayStartParams": START, "template": TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": START,
            "template": TEMPLATE,
        }
    ],
}
JOB = {
    "entrypoint": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "backoffLimit": int,
    "rayClusterSpec": CLUSTER,
}
KINDS = {"RayCluster": CLUSTER, "RayJob": JOB}


def check(value, form, where):
    if isinstance(form, dict):
        assert isinstance(value, dict), where
        for name, own in value.items():
            assert name in form, f"{where}.{name}"
            check(own, form[name], f"{where}.{name}")
    elif isinstance(form, list):
        assert isinstance(value, list), where
        for i, own in enumerate(value):
            check(own, form[0], f"{where}[{i}]")
    else:
        assert type(value) is form, f"{where}: {value!r}"


@pytest.mark.parametrize(
    ("name", "kind"), [("kubernetes-cluster", "RayCluster"), ("kubernetes-job", "RayJob")]
)
def test_kubernetes_manifests(name, kind):
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert set(raw) == {"apiVersion", "kind", "metadata", "spec"}
    assert (raw["apiVersion"], raw["kind"]) == ("ray.io/v1", kind)
    check(raw["spec"], KINDS[kind], "spec")
    cluster = raw["spec"] if kind == "RayCluster" else raw["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {m["name"] for m in container.get("volumeMounts", [])} == volumes
            assert container["image"].endswith(":" + cluster["rayVersion"])
    worker = cluster["workerGroupSpecs"][0]
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


@pytest.mark.parametrize("name", ["one-machine.sh", "slurm.sbatch"])
def test_bash_reads_it(name):
    done = subprocess.run(["bash", "-n", FOLDER / name], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def stand_in(folder, name, script):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_one_machine_leaves_nothing(tmp_path, signals):
    """Ray's own folder is gone with it, and not before; a signal at this script ends Ray."""
    stand_in(
        tmp_path,
        "ray",
        f"""
        for word; do case $word in --temp-dir=*) own=${{word#*=}};; esac; done
        mkdir -p "$own" && touch "$own/ray_current_cluster" && echo "$own" >{tmp_path}/own
        trap 'signalled=1' TERM
        mv {tmp_path}/own {tmp_path}/up
        until [ "${{signalled:-}}" ]; do sleep 0.05; done
        until [ -e {tmp_path}/go ]; do sleep 0.05; done
        [ -e "$own/ray_current_cluster" ] && exit 7""",
    )
    env = {
        **{n: v for n, v in os.environ.items() if not n.startswith("RAY_")},
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FOLDER": str(tmp_path / "folder"),
    }
    script = ["bash", str(FOLDER / "one-machine.sh")]
    patience = threading.Event()
    with subprocess.Popen(script, env=env) as process:
        try:
            while not (tmp_path / "up").exists() and process.poll() is None:
                patience.wait(0.02)
            own = Path((tmp_path / "up").read_text().strip())
            for number in signals:
                process.send_signal(number)
            (tmp_path / "go").touch()
            assert process.wait(20) == 7
        finally:
            process.kill()
    assert not own.parent.exists()
    assert own.name == "r"


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of three hosts, whose srun runs its command here; notes what was called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    note = f'echo "$(basename "$0") $*" >>{tmp_path}/calls'
    stand_in(tools, "scontrol", f"{note}; printf 'n1\\nn2\\nn3\\n'")
    stand_in(tools, "srun", f'{note}; while [[ $1 == --* ]]; do shift; done; exec "$@"')
    stand_in(
        tools,
        "ray",
        f"{note}; env | grep -c '^RAY_' >{tmp_path}/env; stat -c %a $RAY_AUTH_TOKEN_PATH"
        f" >{tmp_path}/mode; echo $$ >>{tmp_path}/pids; exec sleep 60",
    )
    stand_in(tools, "hamdist", f"{note}; exit 7")
    joined = f'echo "${{ALIVE:-$(cat {tmp_path}/pids | wc -l)}}"'
    stand_in(tools, "python", f'case "$*" in *secrets*) echo secret;; *) {joined};; esac')
    env = {
        **{n: v for n, v in os.environ.items() if not n.startswith("RAY_")},
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "4",
        "CONFIGS": str(FOLDER),
        "WAIT": "1",
    }

    def run(**more):
        command = ["bash", str(FOLDER / "slurm.sbatch"), "digits", "--out", "o"]
        return subprocess.run(
            command, env={**env, **more}, capture_output=True, text=True, timeout=30
        )

    return run, tmp_path


@pytest.mark.timeout(60)
def test_slurm_starts_ray_on_every_host_runs_and_leaves_nothing(slurm):
    run, folder = slurm
    done = run(WAIT="30")
    assert done.returncode == 7, done.stderr  # the run's own
    calls = sorted((folder / "calls").read_text().splitlines())
    common = "--block --disable-usage-stats --num-cpus=4"
    head = f"ray start --head --port=20017 --include-dashboard=false {common}"
    worker = f"ray start --address=n1:20017 {common}"
    assert calls == sorted(
        [
            "scontrol show hostnames n[1-3]",
            f"srun --nodes=1 --ntasks=1 --nodelist=n1 {head}",
            f"srun --nodes=1 --ntasks=1 --nodelist=n2 {worker}",
            f"srun --nodes=1 --ntasks=1 --nodelist=n3 {worker}",
            head,
            worker,
            worker,
            "hamdist run digits --out o --engine ray --set engine.address=n1:20017",
        ]
    )
    assert int((folder / "env").read_text()) == len(HEALTH) + 2
    assert (folder / "mode").read_text().strip() == "600"
    assert not list(folder.glob(".hamdist-*"))
    for pid in (folder / "pids").read_text().split():
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.timeout(60)
def test_slurm_says_so_where_a_host_does_not_join(slurm):
    run, folder = slurm
    done = run(ALIVE="2")
    assert done.returncode == 1
    assert "only 2 of 3 hosts joined Ray" in done.stderr
    assert "hamdist run" not in (folder / "calls").read_text()
    assert not list(folder.glob(".hamdist-*"))
