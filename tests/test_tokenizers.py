"""A tokenizer that is not that of the weights beside it is refused, wherever the two meet."""

import json
import shutil

import pytest
import torch
from test_import import make_public, packed_clap
from tiny_bundle import make_bundle, roberta_tokenizer, t5_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, RobertaTokenizerFast

from pipelines.import_weights import import_weights
from stages.bundle import load
from stages.errors import UserError
from stages.frozen import TextEncoders
from stages.tokenizers import misfit


@pytest.fixture
def others(tmp_path):
    """Folders of tokenizers that do not fit a RoBERTa of 300 embeddings."""
    roberta_tokenizer().train_new_from_iterator([f"word{i}" for i in range(2000)], 1500).save_pretrained(tmp_path / "larger")
    content = json.loads(roberta_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"]["z"] = 300  # no more tokens than before
    RobertaTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content))).save_pretrained(tmp_path / "gaps")
    t5_tokenizer().save_pretrained(tmp_path / "t5")
    return {
        "larger": r"it has 1\d\d\d tokens, the network knows 300",
        "gaps": "it has 301 tokens, the network knows 300",
        "t5": "it pads with token 0, the network with 1",
    }


def test_a_clap_takes_no_other_networks_tokenizer(tmp_path, others):
    _, _, state = packed_clap()
    torch.save(state, tmp_path / "clap.pt")
    for name, problem in others.items():
        with pytest.raises(UserError, match=rf"--with tokenizer=.*{name}: {problem}; expected roberta-base's tokenizer files"):
            import_weights(str(tmp_path / "clap.pt"), tmp_path, given={"tokenizer": str(tmp_path / name)})
    assert not (tmp_path / "imported" / "clap").exists()


def test_few_tokens_are_no_fault(tmp_path, others):
    """T5's table has 28 rows that no token uses."""
    assert misfit(roberta_tokenizer(), 261, 1) is None and misfit(t5_tokenizer(), 1000, 0) is None
    assert misfit(roberta_tokenizer(), 260, 1) == "it has 261 tokens, the network knows 260"
    assert misfit(AutoTokenizer.from_pretrained(tmp_path / "gaps"), 301, 1) is None


@pytest.mark.parametrize(
    ("taken", "place", "problem"),
    [
        ("tokenizer_2", "tokenizer", "it pads with token 0, the network with 1"),
        ("tokenizer", "tokenizer_2", "it has 261 tokens, the network knows 30"),
    ],
)
def test_folders_with_another_tokenizer_are_refused(tmp_path, taken, place, problem):
    """By the import, by what reads captions in passes and trainings, and by what generates."""
    public = make_public(make_bundle(tmp_path / "mine"), tmp_path / "public")
    shutil.rmtree(public / place)
    shutil.copytree(public / taken, public / place)
    for read in (lambda folder: import_weights(str(folder), tmp_path / "work"), load, TextEncoders.load):
        with pytest.raises(UserError, match=f"public/{place} is not that of the weights beside it: {problem}"):
            read(public)
    for path in (public / place).iterdir():
        path.write_text("{}")
    with pytest.raises(UserError, match=f"no tokenizer could be read in .*public/{place}"):
        TextEncoders.load(public)
