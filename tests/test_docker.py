"""The image and its services: what Dockerfile and compose files name exists and agrees with the scripts."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from shell import ROOT, commands_of

HOME = Path("/app")  # of the sources in the image


def instructions() -> list[list[str]]:
    """[[instruction, the rest], …] of the Dockerfile."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    return [line.split(maxsplit=1) for line in "\n".join(lines).replace("\\\n", "").splitlines() if line]


def values(instruction: str) -> list[str]:
    return [value for name, value in instructions() if name == instruction]


[COMMAND], [VOLUMES] = map(json.loads, values("CMD")), map(json.loads, values("VOLUME"))
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The files that the image holds, as .dockerignore allows them."""
    folder = tmp_path_factory.mktemp("image") / "app"
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = [path for line in lines if line.startswith("!") for path in ROOT.glob(line[1:])]
    left_out = shutil.ignore_patterns(*(line.removeprefix("**/") for line in lines if line.startswith("**/")))
    folder.mkdir()
    for path in allowed:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=left_out)
        else:
            shutil.copy(path, folder)
    return folder


def started(command: list[str], sources: Path, **variables: str) -> dict[str, str]:
    """{flag: value} of the program that a command starts in the image."""
    assert command[0] == "bash"
    program, *words = commands_of(command[1], root=sources, **variables)[0]
    assert Path(program).is_relative_to(sources) and Path(program).exists()
    return {word: value for word, value in zip(words, words[1:], strict=False) if word.startswith("--")}


def is_in_a_volume(path: str, sources: Path) -> bool:
    place = HOME / Path(path).relative_to(sources)
    return any(place.is_relative_to(volume) for volume in VOLUMES)


def test_the_image_installs_every_requirement_before_the_sources_come():
    [install] = [words.split() for words in values("RUN") if "environment.py" in words]
    files = [word for word in install if word.endswith(".txt")]
    assert sorted(files) == sorted(file.name for file in ROOT.glob("requirements*.txt"))
    copied = [word for words in values("COPY")[:-1] for word in words.split()[:-1]]
    assert {*files, install[install.index("python3") + 1]} == set(copied)
    assert all((ROOT / name).is_file() for name in copied) and values("COPY")[-1] == ". ."


def test_the_image_trains_as_an_ordinary_user_into_its_volumes(sources):
    assert COMMAND == ["bash", "ptuning/train.sh"]
    assert values("WORKDIR") == [str(HOME)]
    assert int(values("USER")[-1]) > 0
    for method in ("ptuning", "lora", "full"):
        assert is_in_a_volume(started(["bash", f"{method}/train.sh"], sources)["--output_dir"], sources)
    caches = dict(re.findall(r"(\w+)=(\S+)", " ".join(values("ENV"))))
    assert caches.keys() == {"HF_HOME", "CHATGLM_CACHE"}
    assert all(Path(place).is_relative_to("/cache") for place in caches.values()) and "/cache" in VOLUMES


@pytest.mark.parametrize("name", ["web", "api"])
def test_a_service_listens_where_its_port_is_published_for_this_machine_alone(name, sources):
    service = SERVICES[name]
    given = dict(variable.partition("=")[::2] for variable in service["environment"])
    flags = started(service["command"], sources, HOST=given["HOST"], ALLOWED_HOSTS="name.example")
    assert flags["--host"] == "0.0.0.0" and flags["--allowed_hosts"] == "name.example"
    assert service["ports"] == [f"127.0.0.1:{flags['--port']}:{flags['--port']}"]
    assert is_in_a_volume(flags["--checkpoint"], sources)
    script = (ROOT / service["command"][1]).read_text()
    ours = {variable for variable in given if not re.match("HF_|HUB", variable)}
    assert {variable for variable in ours if not re.search(rf"\b{variable}\b", script)} == set()
    assert "ALLOWED_HOSTS" in ours and ours & {"API_KEY", "PASSWORD"}


def test_all_services_share_the_volumes_of_the_image():
    assert SERVICES.keys() == {"train", "web", "api"}
    for service in SERVICES.values():
        assert [volume.partition(":")[2] for volume in service["volumes"]] == VOLUMES
    assert "command" not in SERVICES["train"]  # that of the image
    graphics = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]
    assert {name: service["gpus"] for name, service in graphics.items()} == dict.fromkeys(SERVICES, "all")
