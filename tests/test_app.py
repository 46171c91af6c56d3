"""The page's server, its subjects and its jobs, by real requests and real processes; test_page_* use a browser."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from browser import free_port, until
from training_runs import ROOT, flags

from persam_dreambooth import cli
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.app.jobs import AUTH_VARIABLE
from persam_dreambooth.errors import InputError
from persam_dreambooth.training.meter import metrics_rows


def started(workspace, *words, **variables):
    """A server's process, once it answers, and its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "persam_dreambooth", "app", "--workspace", str(workspace), "--port", str(port),
         "--no_browser", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables},
    )  # fmt: skip
    line = process.stdout.readline()
    assert line == f"the page: http://127.0.0.1:{port}; Ctrl-C closes it\n", line or process.communicate()
    return process, port


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("app") / "outputs"
    desk = Desk(AppOptions(workspace=str(workspace), pretrained_model_name_or_path="toy", sam_model="toy"))
    cat = desk.new_subject("cat")
    (cat.folder / "photos").mkdir()
    (cat.folder / "photos" / "a.jpg").write_bytes(b"a picture")
    (workspace.parent / "secret.jpg").write_bytes(b"secret")
    (cat.folder / "link.jpg").symlink_to(workspace.parent / "secret.jpg")
    (cat.folder / "jobs").mkdir()
    (cat.folder / "jobs" / "0000.log").write_text("token")
    return desk


@pytest.fixture(scope="module")
def server(desk):
    process, port = started(desk.workspace)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "the page is closed; the same command opens it again\n"


def test_the_page_is_served_and_may_load_nothing_from_other_hosts(server):
    answer = server.get("/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file="])
def test_only_pictures_of_the_workspace_are_served(server, desk, route):
    folder = desk.workspace / "cat"
    for closed in (
        "/etc/passwd", f"{folder}/../../secret.jpg", f"{folder}/link.jpg", f"{folder}/jobs/0000.log",
        f"{folder}/subject.yaml", "http://127.0.0.1/a.jpg",
    ):  # fmt: skip
        assert server.get(f"{route}{closed}").status_code == 403, closed
    assert server.get(f"/gradio_api/file={folder}/photos/a.jpg").content == b"a picture"


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "127.0.0.1.evil.com"}],
)
def test_requests_of_other_sites_are_refused(server, headers):
    assert server.get("/", headers=headers).status_code == 403
    assert server.post("/gradio_api/upload", headers=headers, files={"files": b"x"}).status_code == 403


def test_the_pages_own_requests_are_answered(server):
    own = {"Host": f"localhost:{server.base_url.port}", "Origin": f"http://localhost:{server.base_url.port}"}
    assert server.get("/config", headers=own).status_code == 200
    for closed in ("/docs", "/redoc", "/openapi.json", "/gradio_api/mcp/"):
        assert server.get(closed).status_code == 404, closed


def test_a_port_in_use_is_one_line(server, tmp_path, capsys):
    port = str(server.base_url.port)
    assert cli.main(["app", "--workspace", str(tmp_path), "--port", port, "--no_browser"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: port {port} is in use or not allowed: choose another with --port\n"


def test_a_password_is_asked_for(tmp_path):
    process, port = started(tmp_path, **{AUTH_VARIABLE: "anna:9f2c"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/config").status_code == 401
            assert client.get("/gradio_api/file=x.jpg").status_code in (401, 403)
            wrong = client.post("/login", data={"username": "anna", "password": "wrong"})
            assert wrong.status_code == 400
            assert client.post("/login", data={"username": "anna", "password": "9f2c"}).status_code == 200
            assert client.get("/config").status_code == 200
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "options, line",
    [
        ({"listen": True}, "--listen serves other machines: add --auth"),
        ({"auth": "anna"}, "--auth is not name:password"),
        ({"port": 0}, "--port is 0"),
        ({"output_dir": "elsewhere/cat"}, "--output_dir elsewhere/cat is not in outputs: add --workspace elsewhere"),
        ({"resume_from_checkpoint": "latest"}, "--resume_from_checkpoint has no effect"),
    ],
)
def test_options_of_the_page_that_cannot_be(options, line, monkeypatch):
    monkeypatch.delenv(AUTH_VARIABLE, raising=False)
    with pytest.raises(InputError) as refused:
        AppOptions(**options).check()
    assert str(refused.value).startswith(line)


# Subjects


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", ".hidden", "c:", "a\n", " a", "x" * 101])
def test_a_subjects_name_is_that_of_a_folder(desk, name):
    with pytest.raises(InputError):
        desk.subject(name)


def test_options_of_a_subject_are_saved_over_those_of_the_page(tmp_path):
    desk = Desk(AppOptions(workspace=str(tmp_path), rank=8, seed=3))
    dog = desk.new_subject("my_dog")
    assert (dog.options().rank, dog.photos_dir, dog.photos()) == (8, None, [])
    dog.save_options(rank=16, identifier="zwx")
    (dog.folder / "photos").mkdir()
    options = dog.options()
    assert (options.rank, options.seed, options.identifier, options.subject) == (16, 3, "zwx", "my dog")
    dog.save_options(rank=None)
    assert (dog.options().rank, dog.options().identifier) == (8, "zwx")
    with pytest.raises(InputError, match="--rank is two"):
        dog.save_options(rank="two")
    assert desk.subjects() == ["my_dog"]


def test_photos_of_the_command_make_a_subject(photos, tmp_path):
    options = AppOptions(workspace=str(tmp_path), instance_dir=str(photos), class_name="duck")
    for desk in (Desk(options), Desk(options)):  # the second one opens it again
        assert (desk.start, desk.subjects()) == ("photos", ["photos"])
    subject = desk.subject("photos")
    assert [photo.name for photo in subject.photos()] == ["00.png", "01.png", "02.png", "03.png"]
    assert subject.options().subject == "duck"
    assert (desk.base.instance_dir, desk.base.class_name) == (None, None)


# Jobs


def test_a_training_outlives_its_killed_server_and_the_next_job_waits(photos, tmp_path):
    desk = Desk(AppOptions(workspace=str(tmp_path / "outputs")))
    cat, dog = desk.new_subject("cat"), desk.new_subject("dog")
    run = cat.folder / "masked"
    given = flags(
        instance_dir=photos, mask_dir=photos.parent / "masks", class_name="duck", max_train_steps=20, logging_steps=1,
        pretrained_model_name_or_path="toy", resolution=32, num_validation_images=0, output_dir=run,
    )  # fmt: skip
    script = (
        "import sys, time\nfrom persam_dreambooth.app.desk import Desk\n"
        "from persam_dreambooth.app.app_options import AppOptions\n"
        "desk = Desk(AppOptions(workspace=sys.argv[1]))\n"
        "desk.jobs.submit(desk.subject('cat'), ['train', *sys.argv[2:]])\nprint('submitted', flush=True)\n"
        "time.sleep(600)"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", script, str(desk.workspace), *given]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=variables) as server:
        assert server.stdout.readline() == "submitted\n"
        [training] = desk.jobs.of(cat)
        waiting, stopped = desk.jobs.submit(dog, ["train"]), desk.jobs.submit(dog, ["train"])
        assert [job.number for job in desk.jobs.all()] == [1, 2, 3]
        stopped.stop()
        until(lambda: stopped.state == "stopped", stopped)
        until(lambda: metrics_rows(run), training.log)
        server.kill()
    assert (training.state, waiting.state, cat.is_busy(run)) == ("running", "waiting", True)
    until(lambda: training.state == "done", training.log)
    assert metrics_rows(run)[-1]["step"] == 20
    assert training.message.startswith(f"done: {run}; see ")
    assert (list(cat.runs), cat.is_busy(run)) == (["masked"], False)
    until(lambda: waiting.state == "failed", waiting.log)
    assert (waiting.code, waiting.message) == (2, "error: --instance_dir is missing: folder with 3 to 6 photos of the "
                                               "subject")  # fmt: skip


def test_a_killed_job_is_told_apart_and_lets_the_next_one_begin(desk):
    psutil = pytest.importorskip("psutil")
    cat = desk.subject("cat")
    first = desk.jobs.submit(cat, ["demo", "--output_dir", str(desk.workspace / "demo")])
    second = desk.jobs.submit(cat, ["--version"])
    [process] = [one for one in psutil.process_iter(["cmdline"]) if str(first.path) in (one.info["cmdline"] or ())]
    until(lambda: first.state == "running", first.log)
    process.kill()
    until(lambda: second.state == "done", second.log)
    assert (first.state, first.code) == ("killed", None)
    assert second.message.count(".") >= 1
    assert Path(second.path).with_suffix(".stop").exists() is False


@pytest.mark.parametrize("name", ["instance_dir", "mask", "mask_dir"])
def test_what_is_not_there_is_said_before_the_page_opens(name, tmp_path, capsys):
    assert cli.main(["app", "--no_browser", "--workspace", str(tmp_path / "w"), f"--{name}", str(tmp_path / "no")]) == 2
    assert f"--{name} {tmp_path / 'no'} does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
