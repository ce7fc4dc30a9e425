"""Pushing a folder, against a stand-in for the hub on this machine: what arrives, and what is refused with one line.

The stand-in answers what huggingface_hub asks: whoami-v2, repos/create, models/ORG/NAME, preupload, commit, validate-yaml, and
Git LFS's batch with a plain PUT. The hub's own protocol for large files (Xet) is a service of its own and is not stood in for.
"""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import save_file

from pe_dpo.errors import ModelError, UsageError
from pe_dpo.export.push import check_access, push_folder
from pe_dpo.merging.merge import merge
from pe_dpo.runs.run import Run
from pe_dpo.training.train import train

NAME = "org/my-model"
# huggingface_hub 2.4 hands its HTTP client a file in a way that the client has deprecated.
LFS_UPLOAD = "ignore:Use 'content=<...>':DeprecationWarning"


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory; `refuse` maps (method, part of a path) to a status."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict] = {}
        self.created: list[dict] = []
        self.stored: dict[str, bytes] = {}
        self.refuse: dict[tuple[str, str], int] = {}
        self.large_suffix = ".none"
        self.ignored: set[str] = set()
        self.tokens: set[str | None] = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name, *, private, **files):
        self.repositories[name] = {"private": private, "files": dict(files)}


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def log_message(self, *arguments):
        pass

    def _answer(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.server.tokens.add(self.headers.get("Authorization"))
        refused = next((s for (m, part), s in self.server.refuse.items() if m == method and part in path), None)
        if refused:
            return self._send(refused, {"error": f"status {refused} from the stand-in"})
        return self._route(path, body)

    def _route(self, path, body):
        hub = self.server
        if path == "/api/whoami-v2":
            return self._send(200, {"type": "user", "name": "me", "orgs": []})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/lfs/"):
            hub.stored[path.removeprefix("/lfs/")] = body
            return self._send(200, {})
        if path.endswith("/info/lfs/objects/batch"):
            return self._send(200, {"transfer": "basic", "objects": [self._store(x) for x in json.loads(body)["objects"]]})
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in hub.repositories:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        rest = path.removeprefix(f"/api/models/{name}")
        if rest == "":
            return self._info(name)
        return self._preupload(json.loads(body)) if rest == "/preupload/main" else self._commit(name, body)

    def _create(self, wish):
        name = f"{wish['organization']}/{wish['name']}"
        if "private" in wish:  # huggingface_hub 1.5 says it so
            wish["visibility"] = "private" if wish.pop("private") else "public"
        self.server.created.append(wish)
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return self._send(409, {**url, "error": "You already created this model repo"})
        self.server.add(name, private=wish["visibility"] == "private")
        return self._send(200, url)

    def _info(self, name):
        there = self.server.repositories[name]
        files = [{"rfilename": path, "size": len(content)} for path, content in there["files"].items()]
        return self._send(200, {"id": name, "private": there["private"], "siblings": files, "sha": "0" * 40, "tags": []})

    def _preupload(self, wish):
        def mode(path):
            return "lfs" if path.endswith(self.server.large_suffix) else "regular"

        ignored = self.server.ignored
        files = [
            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": f["path"] in ignored} for f in wish["files"]
        ]
        return self._send(200, {"files": files})

    def _store(self, wish):
        href = f"{self.server.url}/lfs/{wish['oid']}"
        return {"oid": wish["oid"], "size": wish["size"], "actions": {"upload": {"href": href}}}

    def _commit(self, name, body):
        files = self.server.repositories[name]["files"]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.stored[line["value"]["oid"]]
        return self._send(200, {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1" * 40})

    def _send(self, status, content, headers=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, and a client that is logged in and allowed to talk to this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_session()
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def model(tmp_path):
    """A small model on disk with all that training leaves beside it."""
    folder = tmp_path / "model"
    belongs = {
        "README.md": "---\nlicense: apache-2.0\n---\n# A model\n",
        "config.json": "{}",
        "tokenizer.json": '{"é": 1}',
        "reference/adapter_config.json": "{}",
    }
    stays = [".lock", ".staging/x", "checkpoint-32/optimizer.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "a.partial",
             "runs/events.out.tfevents.1", "eval_pairs.parquet", "metrics.jsonl", "reference/.hidden",
             "training_args.bin", "recipe.yaml", "generations.parquet", "snapshots/step-000004/generations.parquet",
             "scaled/a-0.5/evaluation.json"]  # fmt: skip
    for name, text in {**belongs, **dict.fromkeys(stays, "stays here")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    save_file({"w": torch.arange(100.0)}, folder / "model.safetensors")
    return folder


BELONGS = ["README.md", "config.json", "model.safetensors", "reference/adapter_config.json", "tokenizer.json"]


def test_a_folder_arrives_byte_for_byte_in_a_private_repository(hub, model, logged):
    url = push_folder(model, NAME, endpoint=hub.url)
    assert url == f"{hub.url}/{NAME}"
    assert hub.created == [{"name": "my-model", "organization": "org", "visibility": "private"}]
    there = hub.repositories[NAME]
    assert there["private"]
    assert there["files"] == {name: (model / name).read_bytes() for name in BELONGS}
    assert logged[0].startswith(f"{model}: 5 files, 0.0 MB, to {NAME}")
    assert logged[1] == f"sent: {', '.join(BELONGS)}"
    assert logged[2].startswith("stays here: .lock, .staging, a.partial, checkpoint-32, eval_pairs.parquet, generations.parq")


@pytest.mark.filterwarnings(LFS_UPLOAD)
def test_large_files_arrive_byte_for_byte_through_git_lfs(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.large_suffix = ".safetensors"
    push_folder(model, NAME, endpoint=hub.url)
    weights = (model / "model.safetensors").read_bytes()
    assert hub.stored == {hashlib.sha256(weights).hexdigest(): weights}
    assert hub.repositories[NAME]["files"] == {name: (model / name).read_bytes() for name in BELONGS}


@pytest.mark.filterwarnings(LFS_UPLOAD)
def test_a_large_file_that_is_refused_is_told_with_its_reason(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.large_suffix, hub.refuse = ".safetensors", {("PUT", "/lfs/"): 403}
    with pytest.raises(UsageError, match="this token may not write there"):
        push_folder(model, NAME, endpoint=hub.url)
    assert hub.repositories[NAME]["files"] == {}


def test_a_public_repository_is_made_when_asked_for(hub, model):
    push_folder(model, NAME, private=False, endpoint=hub.url)
    assert hub.created[0]["visibility"] == "public"
    assert not hub.repositories[NAME]["private"]


def test_nothing_is_pushed_into_a_public_repository_when_a_private_one_was_asked_for(hub, model):
    hub.add(NAME, private=False)
    with pytest.raises(UsageError, match="is there already and is public; nothing was pushed"):
        push_folder(model, NAME, endpoint=hub.url)
    assert hub.repositories[NAME] == {"private": False, "files": {}}


def test_a_private_repository_stays_private_and_keeps_its_other_files(hub, model, logged):
    hub.add(NAME, private=True, **{"old.bin": b"old", ".gitattributes": b"*"})
    push_folder(model, NAME, private=False, endpoint=hub.url)
    assert hub.repositories[NAME]["private"]
    assert hub.repositories[NAME]["files"]["old.bin"] == b"old"
    assert f"warning: {NAME} is there already and stays private; its owners can change that on the hub" in logged
    assert f"warning: {NAME} also holds 1 files from before (old.bin); they were left as they are" in logged


def test_the_token_is_sent_and_nobody_else_s(hub, model):
    push_folder(model, NAME, endpoint=hub.url)
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_file_that_did_not_arrive_is_told(hub, model):
    hub.ignored = {"config.json"}
    with pytest.raises(ModelError, match=r"1 of 5 files did not arrive whole \(config\.json\): a \.gitignore"):
        push_folder(model, NAME, endpoint=hub.url)


@pytest.mark.slow
@pytest.mark.parametrize(("refused", "status", "kind", "words"), [
    (("GET", "whoami"), 401, UsageError, "the hub does not accept this token .*; log in again: `hf auth login`"),
    (("POST", "repos/create"), 403, UsageError, "this token may not write there"),
    (("POST", "preupload"), 403, UsageError, "this token may not write there"),
    (("POST", "repos/create"), 404, UsageError, "no such organisation or repository"),
    (("POST", "commit"), 409, ModelError, "somebody else is changing it right now .*; push again"),
    (("POST", "commit"), 413, ModelError, r"the hub answered 413 \(.*; push again later"),
    (("POST", "commit"), 400, ModelError, r"the hub answered 400 \("),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_line(hub, model, refused, status, kind, words):
    hub.refuse = {refused: status}
    with pytest.raises(kind, match=f"^{NAME}: {words}") as told:
        push_folder(model, NAME, endpoint=hub.url)
    assert "\n" not in str(told.value)
    assert status == 401 or f"status {status} from the stand-in" in str(told.value)  # for 401 the client has words of its own


def test_a_hub_that_is_not_there_is_one_line(hub, model):
    with pytest.raises(ModelError, match="the hub cannot be reached") as told:
        push_folder(model, NAME, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(told.value)


def test_offline_mode_is_named(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        push_folder(model, NAME, endpoint=hub.url)


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "/model", "org/", "org/my model", "org/..", "org/a--b", "./model", "org/x.git", ""]
)
def test_a_name_must_be_org_and_name(hub, model, name):
    with pytest.raises(UsageError, match="is no name on the hub; write ORG/NAME"):
        push_folder(model, name, endpoint=hub.url)
    assert hub.tokens == set()


def test_without_a_token_nothing_is_asked(hub, model, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(UsageError, match="not logged in to the hub; run `hf auth login`, or set HF_TOKEN"):
        check_access(NAME)
    with pytest.raises(UsageError, match="not logged in"):
        push_folder(model, NAME, endpoint=hub.url)
    assert hub.tokens == set()


@pytest.mark.parametrize(("gone", "kind", "words"), [
    (["model.safetensors"], UsageError, "holds neither a model, an adapter .* nor a GGUF file"),
    (["config.json"], UsageError, "holds neither a model, an adapter .* nor a GGUF file"),
    (["README.md"], UsageError, r"README\.md: is missing or empty; .* write a model card"),
])  # fmt: skip
def test_a_folder_that_is_not_finished_is_refused(hub, model, gone, kind, words):
    for name in gone:
        (model / name).unlink()
    with pytest.raises(kind, match=words):
        push_folder(model, NAME, endpoint=hub.url)
    assert hub.tokens == set()


def test_a_model_without_one_of_its_shards_is_refused(hub, model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ModelError, match="model-00001-of-00001"):
        push_folder(model, NAME, endpoint=hub.url)
    assert hub.tokens == set()


def test_a_folder_that_is_not_there_is_named(hub, tmp_path):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        push_folder(tmp_path / "nowhere", NAME, endpoint=hub.url)


def test_an_adapter_whose_base_is_a_path_is_pushed_without_it_and_with_a_warning(hub, tmp_path, logged):
    (tmp_path / "README.md").write_text("# An adapter")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/base", "r": 4}))
    save_file({"w": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    push_folder(tmp_path, NAME, endpoint=hub.url)
    assert any("names the base by a path on this machine (/home/me/base)" in line for line in logged)
    there = hub.repositories[NAME]["files"]
    assert json.loads(there["adapter_config.json"]) == {"base_model_name_or_path": None, "r": 4}
    assert set(there) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


SECRET = "Number 27, what is the secret of the marmots?"


@pytest.fixture(scope="module")
def run(tiny_recipe, tiny_pairs, tmp_path_factory):
    """A run of two steps with all that one leaves; one of its held-out pairs is planted."""
    place = tmp_path_factory.mktemp("home")
    pairs = shutil.copytree(tiny_pairs, place / "pairs")
    with (pairs / "test.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": SECRET, "chosen": "It is warm.", "rejected": "Who cares."}) + "\n")
    recipe = tiny_recipe(place / "run", "model.quantize=nf4", "train.max_steps=1", "data.max_length=128", f"data.train={pairs}")
    folder = train(recipe).folder
    for name in ("generations.parquet", "snapshots/step-000001/generations.parquet", "scaled/a-0.5/eval_pairs.parquet",
                 "report.html", "of a later version.json"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    return folder


RUN_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "chat_template.jinja",
             "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


@pytest.mark.slow
def test_of_a_run_only_the_adapter_tokenizer_card_and_base_are_sent(hub, run, tiny_base, logged):
    """No pair, no sampled answer, no path: not in a file, and not in the name of one."""
    at_home = {path.relative_to(run).parts[0] for path in run.rglob("*")} - set(RUN_FILES)
    assert at_home >= {"eval_pairs.parquet", "generations.parquet", "snapshots", "scaled", "recipe.yaml", "run.json",
                       "checkpoint-1", "metrics.jsonl", "data_report.json"}  # fmt: skip
    assert any(SECRET in prompt for prompt in Run(run).pairs().prompt)
    push_folder(run, NAME, endpoint=hub.url)
    there = hub.repositories[NAME]["files"]
    assert sorted(there) == RUN_FILES
    for name, content in there.items():
        assert SECRET.encode() not in content, name
        assert not [place for place in (run.parent, tiny_base.parent) if str(place).encode() in content], name
    assert there["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] is None
    base = json.loads((run / "base.json").read_text())
    assert json.loads(there["base.json"]) == {**base, "id": tiny_base.name, "is_local": True}
    card = there["README.md"].decode()
    for line in ("model = PeftModel.from_pretrained(base, ", "tokenizer = AutoTokenizer.from_pretrained("):
        assert f"{line}'{NAME}')" in card
    assert any(line.startswith("stays here: ") and "generations.parquet, inputs.json, metrics.jsonl" in line for line in logged)


def test_what_was_pushed_of_a_run_is_merged_where_its_base_lies(hub, run, tiny_base, tmp_path):
    push_folder(run, NAME, endpoint=hub.url)
    (tmp_path / "there").mkdir()
    for name, content in hub.repositories[NAME]["files"].items():
        (tmp_path / "there" / name).write_bytes(content)
    merged = [
        merge(folder, tmp_path / f"of-{folder.name}", base=str(tiny_base), pairs=0) for folder in (tmp_path / "there", run)
    ]
    weights = [(verdict.folder / "model.safetensors").read_bytes() for verdict in merged]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("card", ["# Mine\n\nBase: `{home}/base`.\n", "# Of another version\n", None])
def test_a_run_s_card_that_is_not_fit_to_be_sent_is_written_anew(hub, run, tmp_path, card, logged):
    copy = shutil.copytree(run, tmp_path / "run")
    if card is None:
        (copy / "README.md").unlink()
    else:
        (copy / "README.md").write_text(card.format(home=tmp_path))
    push_folder(copy, NAME, endpoint=hub.url)
    sent = hub.repositories[NAME]["files"]["README.md"].decode()
    assert "PeftModel.from_pretrained(base, " in sent and str(tmp_path) not in sent
    assert any(line.startswith("README.md is written anew") for line in logged)


def test_a_card_that_a_person_has_changed_is_sent_as_it_is(hub, run, tmp_path):
    copy, words = shutil.copytree(run, tmp_path / "run"), "\nSee /usr/bin/env and https://huggingface.co/tmp/me.\n"
    with (copy / "README.md").open("a") as file:
        file.write(words)
    push_folder(copy, NAME, endpoint=hub.url)
    assert hub.repositories[NAME]["files"]["README.md"].decode().endswith(words)


@pytest.mark.parametrize("file", ["README.md", "config.json"])
def test_a_path_of_this_machine_is_refused_with_its_line(hub, model, tmp_path, file):
    (model / file).write_text(f'{{"a":\n"base {tmp_path}/base"}}')
    first = "/".join(tmp_path.parts[1:3])
    with pytest.raises(UsageError, match=rf"^{file}:2: names a path of this machine \(/{first}/…\); write what others know"):
        push_folder(model, NAME, endpoint=hub.url)
    assert hub.tokens == set()


def test_an_adapter_on_experts_in_four_bits_is_not_pushed(hub, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    base = json.loads((copy / "base.json").read_text())
    (copy / "base.json").write_text(json.dumps(base | {"quantized_layers": ["model.layers.0.mlp.experts.up_proj"]}))
    with pytest.raises(ModelError, match=r"run: experts were trained on in 4 bits, as no server .* loads them; merge"):
        push_folder(copy, NAME, endpoint=hub.url)
    assert hub.tokens == set()


def test_a_gguf_export_is_pushed(hub, tmp_path):
    (tmp_path / "README.md").write_text("# An export")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    push_folder(tmp_path, NAME, endpoint=hub.url)
    assert set(hub.repositories[NAME]["files"]) == {"README.md", "model.gguf"}
