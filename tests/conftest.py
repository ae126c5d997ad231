"""What the tests share: real recordings where they are at hand, one local Ray cluster, quiet libraries."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

import local_ray

T = TypeVar("T")

# Before ray is imported anywhere: a closed cluster, no telemetry, short polls.
local_ray.prepare()
for key, value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "300",  # against hangs alone: starting a worker took 60 s beside other work
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(key, value)

REPO = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for `rounds` is one that `make soak` runs at length; files with slow tests come first.

    The slow ones start several Rays each: begun last, one of two processes would finish them alone.
    """
    slow: Counter[Path] = Counter()
    for item in items:
        if "rounds" in getattr(item, "fixturenames", ()):
            item.add_marker("soak")
        slow[item.path] += item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: -slow[item.path])  # stable: the order within a file stays


@pytest.fixture(scope="session")
def rounds() -> Callable[[T, T], T]:
    """`rounds(short, long)`: how often to kill, draw or repeat; `long` where LOA_SOAK is set (`make soak`), `short` elsewhere."""
    soaking = os.environ.get("LOA_SOAK", "0") not in ("", "0")
    return lambda short, long: long if soaking else short


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `data/` (real recordings) and `golden/` (the references' numbers)."""
    folder = Path(os.environ.get("LOA_SHARED", REPO.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference recordings and golden values at {folder} (set LOA_SHARED to their folder)")
    return folder


@pytest.fixture(scope="session")
def ray_cluster():
    """One local cluster for the whole session; more logical CPUs than cores keeps pools from starving each other."""
    import ray

    from pipelines import cluster

    cluster.connect("local", num_cpus=4)
    import ray.data

    ray.data.DataContext.get_current().print_on_execution_start = False
    yield ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


# Tiny systems with random weights (tiny_bundle.py); whoever changes one makes a copy.


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    from tiny_bundle import make_bundle

    return make_bundle(tmp_path_factory.mktemp("sound") / "bundle")


@pytest.fixture(scope="session")
def speech_bundle(tmp_path_factory):
    from tiny_bundle import make_bundle

    return make_bundle(tmp_path_factory.mktemp("speech") / "bundle", speech=True)


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """A bundle that was trained for some seconds, all of whose stages can be trained further."""
    from tiny_store import learned_bundle

    return learned_bundle(tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="session")
def generator(bundle):
    from stages.generator import AudioGenerator

    return AudioGenerator.load(bundle, "cpu")


@pytest.fixture(scope="session")
def speaker(speech_bundle):
    from stages.generator import AudioGenerator

    return AudioGenerator.load(speech_bundle, "cpu")


@pytest.fixture(scope="session")
def phonemes():
    """Skips where espeak-ng cannot be had."""
    from stages.errors import UserError
    from stages.phonemes import pronounce

    try:
        return pronounce("Hello there.")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3_server():
    """An emulated S3 on loopback, for this process and those it starts."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    yield settings["AWS_ENDPOINT_URL"]
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def s3(s3_server):
    """The URL of a fresh bucket on the emulated S3."""
    import uuid

    import fsspec

    bucket = f"loa-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}"
