"""The HTTP API on a plain app, one real Ray Serve application, and the command that writes files."""

import base64
import io
import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from fastapi.testclient import TestClient
from tiny_bundle import AUDIO, make_bundle

from serving import app
from serving.generate import main as generate_command
from serving.generate import output_files
from serving.service import NDJSON, Busy, Job, Limits, ServeArgs, build, create_api, run_jobs
from stages.bundle import read_info
from stages.errors import UserError
from stages.sampling import Sampling

ROUTE = "/v1/audio/generations"


class Here:
    """A backend without a cluster: carries out one job at a time."""

    def __init__(self, generator, full=False):
        self.generator, self.full, self.jobs = generator, full, []

    async def events(self, job):
        if self.full:
            raise Busy
        self.jobs.append(job)
        told = []
        run_jobs(self.generator, [job], told.append)
        for events in told:
            yield events[0]


@pytest.fixture(scope="module")
def backend(generator):
    return Here(generator)


@pytest.fixture(scope="module")
def client(bundle, backend):
    info = read_info(bundle)
    return TestClient(create_api(lambda: backend, info, Limits.of(info)))


def read(data):
    return soundfile.read(io.BytesIO(data), dtype="float32")


# ------------------------------------------------------------------------------------------------------------ routes


def test_a_request_gets_the_generators_sound(client, generator):
    answer = client.post(ROUTE, json={"prompt": "a dog", "num_inference_steps": 3, "seed": 11})
    assert answer.status_code == 200 and answer.headers["content-type"] == "audio/wav"
    assert answer.headers["x-loa-seed"] == "11"
    waveform, rate = read(answer.content)
    assert rate == 16_000 and len(waveform) == AUDIO.clip_samples
    expected = generator.generate("a dog", num_inference_steps=3, seed=11)[0]
    np.testing.assert_allclose(waveform, np.clip(expected, -1, 1), atol=1e-4)


def test_flac_and_length(client):
    answer = client.post(ROUTE, json={"prompt": "a dog", "num_inference_steps": 1, "format": "flac", "seconds": 0.4})
    assert answer.headers["content-type"] == "audio/flac" and answer.content[:4] == b"fLaC"
    assert len(read(answer.content)[0]) == 6400


def test_a_drawn_seed_repeats_the_sound(client):
    body = {"prompt": "a dog", "num_inference_steps": 1}
    first = client.post(ROUTE, json=body)
    again = client.post(ROUTE, json=body | {"seed": int(first.headers["x-loa-seed"])})
    assert again.content == first.content
    assert client.post(ROUTE, json=body).content != first.content


def test_progress_comes_in_lines(client):
    answer = client.post(ROUTE, json={"prompt": "a dog", "num_inference_steps": 4, "seed": 2}, headers={"accept": NDJSON})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[:-1] == [{"step": i, "total": 4} for i in (1, 2, 3, 4)]
    plain = client.post(ROUTE, json={"prompt": "a dog", "num_inference_steps": 4, "seed": 2})
    assert base64.b64decode(lines[-1]["audio"]) == plain.content and lines[-1]["seed"] == 2


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt: field required"),
        ({"prompt": "  "}, "prompt is empty; describe a sound"),
        ({"promt": "x", "prompt": "x"}, "unknown field 'promt'; did you mean 'prompt'?"),
        ({"prompt": "x", "seconds": 31}, "seconds is 31; the maximum of this server is 30"),
        ({"prompt": "x", "seconds": 0.01}, "seconds is 0.01; expected at least 0.04"),
        ({"prompt": "x", "seconds": -1}, "seconds: input should be greater than 0"),
        ({"prompt": "x", "num_inference_steps": 201}, "num_inference_steps is 201; the maximum of this server is 200"),
        ({"prompt": "x", "guidance_scale": 99}, "guidance_scale is 99; the maximum of this server is 20"),
        (
            {"prompt": "x", "guidance_scale": 1, "negative_prompt": "y"},
            "a negative_prompt needs guidance: raise guidance_scale above 1 or leave it out",
        ),
        ({"prompt": "x" * 1001}, "prompt has 1001 characters; the maximum of this server is 1000"),
        ({"prompt": "x", "format": "mp3"}, "format is 'mp3'; expected one of wav, flac"),
        (
            {"prompt": "x", "scheduler": "dim"},
            "scheduler is 'dim'; did you mean 'ddim'? expected one of dpm-solver++, ddim, unipc, pndm, euler",
        ),
        ({"prompt": "x", "transcription": "y"}, "this model makes sounds, not speech: leave transcription out"),
        ({"prompt": "x", "seed": "s"}, "seed: input should be a valid integer, unable to parse string as an integer"),
    ],
)
def test_bad_requests_get_a_sentence(client, body, sentence):
    answer = client.post(ROUTE, json=body)
    assert (answer.status_code, answer.json()) == (422, {"detail": sentence})


def test_broken_json(client):
    answer = client.post(ROUTE, content=b"{oops", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["detail"]) == (422, "the body is not valid JSON")


def test_a_full_queue_is_503(bundle, generator):
    info = read_info(bundle)
    busy = TestClient(create_api(lambda: Here(generator, full=True), info, Limits.of(info)))
    for accept in ("audio/wav", NDJSON):
        answer = busy.post(ROUTE, json={"prompt": "x"}, headers={"accept": accept})
        assert answer.status_code == 503 and "queue is full" in answer.json()["detail"] and answer.headers["retry-after"] == "5"


def test_page_model_and_health(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "https://" not in page.text and 'src="http' not in page.text  # nothing comes from elsewhere
    assert "default-src 'none'" in page.headers["content-security-policy"]
    model = client.get("/v1/model").json()
    assert (model["variant"], model["sample_rate"], model["speech"]) == ("audioldm2-full-tiny", 16_000, False)
    assert model["limits"]["max_seconds"] == 30 and model["limits"]["default_seconds"] == AUDIO.clip_seconds
    assert model["provenance"] == {"made_by": "tests"}
    assert client.get("/healthz").json() == {"status": "ok"}
    assert ROUTE in client.get("/openapi.json").json()["paths"]


def test_speech_models_want_words(tmp_path, generator):
    info = read_info(make_bundle(tmp_path / "speech", speech=True))
    limits = Limits.of(info)
    assert limits.max_seconds == AUDIO.clip_seconds  # one LOA spans one clip
    answer = TestClient(create_api(lambda: Here(generator), info, limits)).post(ROUTE, json={"prompt": "a man"})
    assert answer.status_code == 422 and "give the text to speak" in answer.json()["detail"]


def job(**changes):
    values = {
        "negative_prompt": None,
        "transcription": None,
        "seconds": 0.64,
        "sampling": Sampling(num_inference_steps=2),
        "seed": 0,
        "format": "wav",
        "prompt": "rain",
    }
    return Job(**(values | changes))


def test_fitting_jobs_share_a_batch_and_failures_stay_apart(generator, monkeypatch):
    calls, generate = [], generator.generate
    monkeypatch.setattr(generator, "generate", lambda prompts, **settings: (calls.append(prompts), generate(prompts, **settings))[1])
    told = []
    run_jobs(generator, [job(prompt="a"), job(prompt="b", seconds=0.01), job(prompt="c", seed=4)], told.append)
    assert calls == [["a", "c"], ["b"]]
    final = {i: event for events in told for i, event in events.items() if "step" not in event}
    assert set(final) == {0, 1, 2} and final[1]["status"] == 422 and "at least 0.04" in final[1]["error"]
    alone = []
    run_jobs(generator, [job(prompt="c", seed=4)], alone.append)
    np.testing.assert_allclose(read(final[2]["audio"])[0], read(alone[-1][0]["audio"])[0], atol=1e-4)


def test_work_that_nobody_waits_for_is_given_up(generator):
    told = []
    jobs = [job(sampling=Sampling(num_inference_steps=50)), job()]
    run_jobs(generator, jobs, told.append, wanted=lambda i: i == 1 or len(told) < 3)
    assert [list(events) for events in told] == [[0], [0], [0], [1], [1], [1]] and "audio" in told[-1][1]


# --------------------------------------------------------------------------------------------------------- Ray Serve


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=400) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.slow
def test_real_serve(ray_cluster, bundle, generator):
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR", "enable_access_log": False})
    args = ServeArgs(bundle=str(bundle), max_batch=2, max_queue=1, num_cpus=0.5, threads=1)
    serve.run(build(args), name="loa-test", route_prefix="/loa-test")
    url = f"http://127.0.0.1:{port}/loa-test"
    try:
        status, data = post(url + ROUTE, {"prompt": "a dog", "num_inference_steps": 2, "seed": 11})
        assert status == 200
        expected = np.clip(generator.generate("a dog", num_inference_steps=2, seed=11)[0], -1, 1)
        np.testing.assert_allclose(read(data)[0], expected, atol=1e-3)

        status, data = post(url + ROUTE, {"prompt": "a dog", "seconds": 99})
        assert status == 422 and b"maximum of this server is 30" in data
        with urllib.request.urlopen(url + "/v1/model", timeout=400) as answer:
            assert json.load(answer)["variant"] == "audioldm2-full-tiny"

        slow = {"prompt": "a dog", "num_inference_steps": 25}
        with ThreadPoolExecutor(10) as pool:
            waiting = [pool.submit(post, url + ROUTE, slow | {"seed": i}) for i in range(10)]
            time.sleep(0.3)
            with urllib.request.urlopen(url + "/healthz", timeout=400) as answer:  # answered while the model works
                assert json.load(answer) == {"status": "ok"}
            statuses = [future.result()[0] for future in waiting]
        assert set(statuses) == {200, 503} and 2 <= statuses.count(200) < 10
    finally:
        serve.delete("loa-test")


# ---------------------------------------------------------------------------------------------------------- commands


def test_a_taken_port_is_a_sentence(bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app.main, ["--bundle", str(bundle), "--port", str(port)])
    assert result.exit_code == 1
    assert f"Error: cannot listen on 127.0.0.1, port {port}" in result.output and "--port" in result.output


def test_serving_nothing_is_a_sentence(tmp_path):
    result = CliRunner().invoke(app.main, ["--bundle", str(tmp_path / "none")])
    assert result.exit_code == 1 and "there is no bundle at" in result.output


def test_loopback_is_recognised():
    assert all(app.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost"))
    assert not any(app.is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "example.org"))


def test_generate_writes_files(tmp_path, bundle, generator):
    out = tmp_path / "dog.wav"
    arguments = ["a dog", "-o", str(out), "--bundle", str(bundle), "--steps", "2", "--device", "cpu", "--seed", "3"]
    result = CliRunner().invoke(generate_command, arguments)
    assert result.exit_code == 0, result.output
    expected = np.clip(generator.generate("a dog", num_inference_steps=2, seed=3)[0], -1, 1)
    np.testing.assert_allclose(soundfile.read(out)[0], expected, atol=1e-4)
    again = CliRunner().invoke(generate_command, arguments)
    assert again.exit_code == 1 and "--force" in again.output
    assert CliRunner().invoke(generate_command, [*arguments, "--force"]).exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["dog.wav"]


def test_generate_keeps_the_most_fitting(tmp_path, bundle, generator):
    out = tmp_path / "dog.flac"
    arguments = ["a dog", "-o", str(out), "--bundle", str(bundle), "--steps", "2", "--num", "2", "--candidates", "4", "--device", "cpu"]
    result = CliRunner().invoke(generate_command, arguments)
    assert result.exit_code == 0, result.output
    candidates = generator.generate("a dog", num_inference_steps=2, num_waveforms_per_prompt=4)
    best = np.argsort(-generator.similarity(["a dog"] * 4, candidates))[:2]
    for i, row in enumerate(best):
        np.testing.assert_allclose(soundfile.read(tmp_path / f"dog-{i + 1}.flac")[0], np.clip(candidates[row], -1, 1), atol=1e-4)


def test_generate_takes_profiles_and_peaks(tmp_path, bundle, generator):
    """Raw by default; the authors' training code saves its samples at a peak of 0.8 (fidelity.md, row 23)."""
    options = ["--profile", "authors", "--candidates", "1", "--steps", "2", "--eta", "0.5", "--device", "cpu", "--bundle", str(bundle)]
    expected = generator.generate("rain", profile="authors", candidates=1, num_inference_steps=2, eta=0.5)[0]
    for name, more, scale in (("raw", [], 1.0), ("loud", ["--peak", "0.8"], 0.8 / np.abs(expected).max())):
        result = CliRunner().invoke(generate_command, ["rain", "-o", str(tmp_path / f"{name}.wav"), *options, *more])
        assert result.exit_code == 0, result.output
        np.testing.assert_allclose(soundfile.read(tmp_path / f"{name}.wav")[0], np.clip(scale * expected, -1, 1), atol=1e-4)


def test_requests_name_a_profile_and_change_it(client, generator):
    """Neighbours and length stay the server's: nobody's sound depends on who else asks."""
    answer = client.post(ROUTE, json={"prompt": "a dog", "profile": "diffusers", "num_inference_steps": 2, "seed": 5})
    expected = generator.generate("a dog", profile="diffusers", num_inference_steps=2, seed=5, padding="prompt", length="loa")[0]
    np.testing.assert_allclose(read(answer.content)[0], expected, atol=1e-4)
    assert set(client.get("/v1/model").json()["profiles"]) == {"loa", "diffusers", "authors"}
    assert "did you mean 'authors'" in client.post(ROUTE, json={"prompt": "x", "profile": "author"}).json()["detail"]


def test_output_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [p.name for p in output_files(None, "A dog, barking!", 1, False)] == ["a-dog-barking.wav"]
    assert [p.name for p in output_files(tmp_path / "x.flac", "", 2, False)] == ["x-1.flac", "x-2.flac"]
    with pytest.raises(UserError, match=r"ends in .wav or .flac"):
        output_files(tmp_path / "x.mp3", "", 1, False)
    with pytest.raises(UserError, match="does not exist"):
        output_files(tmp_path / "no" / "x.wav", "", 1, False)
