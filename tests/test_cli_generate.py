"""`llama-edu generate` and `llama-edu chat`: streams, batches, conversations, and mistakes told in one sentence."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.cli import chat as chat_module
from llama_edu.cli import text_model
from llama_edu.cli.chat import Conversation, PlainChat, choose_format, held_back
from llama_edu.cli.main import run
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer, ChatFormat, Llama3Tokenizer, SentencePieceTokenizer

TEXT = "the river rose and the mills stood still, then the river fell and the mills went on. " * 20
ENDS = ("<|begin_of_text|>", "<|end_of_text|>")


def make_model(vocab_size, max_seq_len=128, seed=0, **changes) -> Transformer:
    """A random model whose words depend on what it has read."""
    cfg = LlamaConfig(
        **{**dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2), **changes},
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
    )
    model = Transformer(cfg)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(6)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model in the layout of Hugging Face with a tokenizer.json."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = BPETokenizer.train([TEXT], 290, special_tokens=ENDS)
    make_model(290).save_pretrained(folder)
    tokenizer.to_hf(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A model with Llama 3's special tokens, and the tokenizer.model of Meta's folders."""
    folder = tmp_path_factory.mktemp("instruct")
    tokenizer = Llama3Tokenizer.train([TEXT], 540)
    make_model(540, 160).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.model")
    (folder / "tokenizer.model.json").unlink()  # Meta's file stands alone
    return folder


def say(monkeypatch, capsys, *args, stdin=None):
    """Exit code, standard output and standard error of a command run in this process."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    code = run([str(a) for a in args])
    return code, *capsys.readouterr()


def expected(folder, text, n, **options):
    model = text_model.load(folder)
    ids = generate(model.network, [model.encode(text)], max_new_tokens=n, stop_ids=model.stop_ids, **options)[0]
    stream = model.tokenizer.stream()
    return "".join(stream.push(i) for i in ids) + stream.finish()


# --- generate --------------------------------------------------------------------------------------------------------


def test_one_prompt_is_continued_and_speed_goes_to_standard_error(base, monkeypatch, capsys):
    args = ("generate", "--model", base, "--max-new-tokens", 20, "--temperature", 0)
    code, out, err = say(monkeypatch, capsys, *args, "the river")
    assert code == 0 and out == expected(base, "the river", 20) + "\n"
    assert re.search(r"^20 tokens, [\d,.]+ tokens a second; \d+ of the prompt read in [\d.]+ s$", err.strip())
    assert say(monkeypatch, capsys, *args, "--prompt", "the river")[1] == out
    assert say(monkeypatch, capsys, *args, stdin="the river\n")[1] == out


def test_drawing_is_that_of_generate(base, monkeypatch, capsys):
    options = ("--temperature", 0.9, "--top-k", 30, "--seed", 5)
    out = say(monkeypatch, capsys, "generate", "the", "--model", base, "--max-new-tokens", 20, *options)[1]
    assert out == expected(base, "the", 20, temperature=0.9, top_k=30, seed=5) + "\n"


def test_text_is_streamed(base, monkeypatch):
    class Out(io.StringIO):
        pieces: list = []  # noqa: RUF012

        def write(self, text):
            self.pieces.append(text)

    monkeypatch.setattr(sys, "stdout", Out())
    run(["generate", "the", "--model", str(base), "--max-new-tokens", "20", "--temperature", "0"])
    assert len([p for p in Out.pieces if p]) > 5


def test_lines_of_standard_input_are_a_batch_answered_in_order(base, monkeypatch, capsys):
    lines = ["the river", "a", "the mills stood still, then", "rose and"]
    args = ("generate", "--model", base, "--max-new-tokens", 15, "--batch", 2)
    code, out, err = say(monkeypatch, capsys, *args, "--temperature", 0, stdin="\n".join(lines))
    assert code == 0 and out.splitlines() == [
        expected(base, line, 15).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for line in lines
    ]
    assert re.search(r"^\d\d tokens, [\d,.]+ tokens a second; 4 of 4 lines$", err.strip())
    drawn = say(monkeypatch, capsys, *args, "--seed", 3, stdin="\n".join(lines))[1]
    model = text_model.load(base)
    prompts = [model.encode(line) for line in lines]
    together = generate(
        model.network, prompts, max_new_tokens=15, temperature=0.8, top_p=0.95, seed=3, stop_ids=model.stop_ids
    )
    assert [len(line) > 0 for line in drawn.splitlines()] == [len(ids) > 0 for ids in together]
    one = model.tokenizer.decode(together[2])
    assert drawn.splitlines()[2].replace("\\n", "\n").replace("\\r", "\r").replace("\\\\", "\\") == one


def test_a_bad_line_is_named_and_the_others_are_answered(base, monkeypatch, capsys):
    lines = ["the river", "", "the " * 300, "rose"]
    args = ("generate", "--model", base, "--max-new-tokens", 5, "--temperature", 0)
    code, out, err = say(monkeypatch, capsys, *args, stdin="\n".join(lines) + "\n")
    good = [expected(base, text, 5) for text in ("the river", "rose")]
    assert code == 2 and out.split("\n") == [good[0], "", "", good[1], ""]
    assert "line 2: the prompt is empty" in err and re.search(r"line 3: the prompt has \d+ tokens, .* of 128", err)
    assert "2 of 4 lines" in err and "Traceback" not in err


def test_a_line_that_breaks_the_network_does_not_take_the_others_with_it(base, tmp_path, monkeypatch, capsys):
    model = Transformer.from_pretrained(base)
    tokenizer = BPETokenizer.from_hf(base / "tokenizer.json")
    model.tok_embeddings.weight.data[tokenizer.encode("#")[0]] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.to_hf(tmp_path / "tokenizer.json")
    args = ("generate", "--model", tmp_path, "--max-new-tokens", 4, "--temperature", 0)
    code, out, err = say(monkeypatch, capsys, *args, stdin="the\n#\nrose\n")
    assert code == 2 and "line 2: the logits are not finite" in err and "tok_embeddings" in err
    lines = out.split("\n")
    assert lines[1] == "" and lines[0] == expected(base, "the", 4) and lines[2] == expected(base, "rose", 4)
    with pytest.raises(
        UserError, match=r"^the logits are not finite after \d ids; the trouble begins at parameter tok_embeddings"
    ):
        run(["generate", "#", *map(str, args[1:])])


def test_ctrl_c_keeps_the_lines_that_are_done(base, monkeypatch, capsys):
    from llama_edu.generation import ContinuousBatcher

    steps, step = [], ContinuousBatcher.step

    def stopping(self):
        steps.append(1)
        if len(steps) == 3:
            self.cancel(1)  # the second line is complete, the first is not
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(ContinuousBatcher, "step", stopping)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\nrose\nstill\n"))
    with pytest.raises(KeyboardInterrupt):
        run(["generate", "--model", str(base), "--max-new-tokens", "30", "--temperature", "0"])
    assert capsys.readouterr().out == "\n" + expected(base, "rose", 2) + "\n"


def command(*args, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "llama_edu.cli.main", *map(str, args)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(line, env=env, text=True, **{**pipes, **kwargs})


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_closed_pipe_ends_in_silence(base, verb):
    args = ["--max-new-tokens", 100] if verb == "chat" else ["the", "--max-new-tokens", 100]
    process = command(verb, *args, "--model", base)
    process.stdout.close()
    process.stdin.write("hello\n" * 3)
    process.stdin.close()
    err = process.stderr.read()
    assert process.wait(60) == 0 and "Traceback" not in err and "Broken" not in err and "Exception" not in err


GENERATE_MISTAKES = [
    ([""], "the prompt is empty: give at least one character"),
    (["the " * 300], r"tokens, which leaves no room in the model's context of 128: shorten it by \d+ or more"),
    (
        ["the", "--max-new-tokens", "128"],
        r"^the prompt has \d+ ids and max_new_tokens is 128; the model's context is 128: ask for at most \d+ new",
    ),
    (["the", "--max-new-tokens", "0"], "max_new_tokens is 0; it must be at least 1"),
    (["the", "--temperature", "-1"], "temperature is -1.0; it must be 0"),
    (["the", "--temperature", "0", "--top-k", "3"], "temperature 0 takes the likeliest token, so top_k means nothing"),
    (["the", "--top-p", "2"], "top_p is 2.0"),
    (["the", "--prompt", "a"], "the text is given twice"),
    (["the", "--batch", "0"], "batch is 0"),
    (["the", "--seed", "-1"], "seed is -1"),
    (["the", "--device", "abacus"], "there is no device 'abacus' on this machine"),
]


@pytest.mark.parametrize(("args", "words"), GENERATE_MISTAKES)
def test_mistakes_are_one_sentence(base, args, words):
    with pytest.raises(UserError, match=words) as caught:
        run(["generate", "--model", str(base), *args])
    assert "\n" not in str(caught.value)


def test_mistakes_about_folders(base, tmp_path, monkeypatch):
    def fails(words, *args):
        with pytest.raises(UserError, match=words):
            run(["generate", "the", "--model", *map(str, args)])

    fails("there is no folder", tmp_path / "none")
    fails("no tokenizer.json and no tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    fails("config.json", tmp_path)
    make_model(280).save_pretrained(tmp_path)
    fails("has ids up to 289, .* only 280 rows: they do not belong together", tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="the prompt is empty: give a text"):
        run(["generate", "--model", str(base)])


def test_ids_that_the_model_does_not_know_are_refused(base):
    with pytest.raises(ValueError, match="id 290; the vocabulary has ids 0 to 289"):
        generate(text_model.load(base).network, [[290]], max_new_tokens=1)


def test_without_a_number_the_answer_fills_what_the_context_has_room_for(base, monkeypatch, capsys):
    code, _, err = say(monkeypatch, capsys, "generate", "the river rose", "--model", base, "--seed", 1)
    assert code == 0 and int(err.split(" tokens")[0]) <= 128


def test_other_tokenizers(tmp_path, instruct, monkeypatch, capsys):
    assert isinstance(text_model.load_tokenizer(instruct), Llama3Tokenizer)
    pieces = SentencePieceTokenizer.train([TEXT], 300)
    make_model(300).save_pretrained(tmp_path)
    pieces.save(tmp_path / "tokenizer.model")
    assert isinstance(text_model.load_tokenizer(tmp_path), SentencePieceTokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "byte_fallback": True}}))
    assert isinstance(text_model.load_tokenizer(tmp_path), SentencePieceTokenizer)  # as in Llama 2's own folders
    (tmp_path / "tokenizer.json").unlink()
    args = ("generate", "the river", "--max-new-tokens", 5, "--temperature", 0, "--model")
    for folder in (tmp_path, instruct):
        assert say(monkeypatch, capsys, *args, folder)[1] == expected(folder, "the river", 5) + "\n"


def test_fewer_bits_are_an_option(base, monkeypatch, capsys):
    args = ("generate", "the river", "--model", base, "--max-new-tokens", 8, "--temperature", 0)
    wide = say(monkeypatch, capsys, *args)[1]
    assert say(monkeypatch, capsys, *args, "--cache", "int8", "--dtype", "float32")[0] == 0 and wide


# --- chat ------------------------------------------------------------------------------------------------------------


def open_chat(folder, context=160, **changes):
    loaded = text_model.load(folder)
    options = dict(context=context, system=None, max_new_tokens=12, seed=None, cache="model")
    options["sampling"] = dict(temperature=0.0)
    return Conversation(loaded, choose_format(loaded, "auto"), **{**options, **changes})


def reads(conversation):
    """A list that grows by the number of tokens of every pass."""
    counted = []
    embeddings = conversation.folder.network.tok_embeddings
    embeddings.register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[1]))
    return counted


def test_a_conversation_is_that_of_the_chat_format(instruct):
    conversation = open_chat(instruct, system="Be short.")
    dialog = [{"role": "system", "content": "Be short."}]
    for text in ("the river", "rose and", "still"):
        got = "".join(conversation.say(text))
        dialog.append({"role": "user", "content": text})
        asked = conversation.ids[: len(conversation.ids) - 1 - len(answer_ids(conversation))]
        if len(dialog) == 2:  # later answers are kept as they were said: their text could be cut into other tokens
            assert asked == ChatFormat(conversation.folder.tokenizer).encode_dialog_prompt(dialog)
        alone = generate(
            conversation.folder.network, [asked], max_new_tokens=12, stop_ids=conversation.folder.stop_ids
        )[0]
        assert answer_ids(conversation) == alone
        stream = conversation.folder.tokenizer.stream()
        assert got == "".join(stream.push(i) for i in alone) + stream.finish()
        dialog.append({"role": "assistant", "content": got})


def answer_ids(conversation):
    """Ids of the last answer, without the end of turn."""
    turn = conversation.turns[-1]
    asked = len(conversation.format.ask(turn.user))
    return turn.ids[asked : len(turn.ids) - len(conversation.format.end())]


def test_each_token_is_read_once(instruct):
    conversation = open_chat(instruct)
    counted = reads(conversation)
    for text in ("the river", "rose and", "still"):
        "".join(conversation.say(text))
    assert sum(counted) == int(conversation.kept.lengths) <= len(conversation.ids)
    assert len(conversation.ids) - sum(counted) <= 2  # the last id, and the end of the turn


def test_the_oldest_turns_are_dropped_when_the_context_is_full(instruct, capsys):
    conversation = open_chat(instruct, context=64)
    for _ in range(5):
        "".join(conversation.say("the river rose"))
        assert len(conversation.ids) <= 64 + 1
    err = capsys.readouterr().err
    assert "the oldest turn was dropped: the conversation fills the context of 64 tokens" in err
    assert 0 < len(conversation.turns) < 5
    fresh = open_chat(instruct, context=64)
    fresh.turns = conversation.turns[:-1]
    assert "".join(fresh.say("the river rose")) == conversation.folder.tokenizer.decode(answer_ids(conversation))


def test_a_message_longer_than_the_context_is_refused_and_the_conversation_goes_on(instruct):
    conversation = open_chat(instruct, context=64)
    first = "".join(conversation.say("the river"))
    with pytest.raises(UserError, match=r"the message has \d+ tokens; there is room for \d+: shorten it"):
        next(conversation.say("the " * 200))
    assert [turn.user for turn in conversation.turns] == ["the river"] and first


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_went(instruct):
    conversation = open_chat(instruct)
    counted = reads(conversation)
    pieces = conversation.say("the river")
    next(pieces)
    next(pieces)
    pieces.close()
    assert 2 <= len(answer_ids(conversation)) < 12 and conversation.ids[-1] in conversation.folder.stop_ids
    "".join(conversation.say("rose"))
    assert sum(counted) == int(conversation.kept.lengths)
    fresh = open_chat(instruct)
    fresh.turns = conversation.turns[:-1]
    assert "".join(fresh.say("rose")) == conversation.folder.tokenizer.decode(answer_ids(conversation))


def test_broken_weights_lose_the_turn_only(instruct):
    conversation = open_chat(instruct)
    "".join(conversation.say("the river"))
    weight = conversation.folder.network.layers["1"].feed_forward.w1.weight
    good = weight.data.clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"not finite .* layers\.1\.feed_forward\.w1"):
        "".join(conversation.say("rose"))
    weight.data.copy_(good)
    fresh = open_chat(instruct)
    fresh.turns = list(conversation.turns)
    assert [t.user for t in conversation.turns] == ["the river"]
    assert "".join(conversation.say("still")) == "".join(fresh.say("still"))


def test_a_base_model_speaks_in_a_script_and_stops_before_the_users_line(base, monkeypatch):
    conversation = open_chat(base, context=128)
    assert isinstance(conversation.format, PlainChat)
    free = "".join(conversation.say("hello"))
    assert len(free) > 4
    stop = free[3:6]
    conversation = open_chat(base, context=128)
    monkeypatch.setattr(PlainChat, "stop_text", stop)
    assert "".join(conversation.say("hello")) == free[: free.index(stop)]
    model = conversation.folder
    assert conversation.ids[: len(conversation.beginning)] == conversation.beginning
    text = model.tokenizer.decode(conversation.ids)
    assert text.endswith("Assistant:" + free[: free.index(stop)]) or stop not in text.split("Assistant:")[1]
    "".join(conversation.say("again"))
    assert int(conversation.kept.lengths) <= len(conversation.ids)


def test_what_may_begin_the_users_line_is_held_back():
    assert [held_back(text, "\nUser:") for text in ("a", "a\n", "a\nUs", "a\nUx", "\nUser")] == [0, 1, 3, 0, 5]
    assert held_back("a\n", None) == 0


def test_the_command_with_its_commands(instruct, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talk.json"
    (tmp_path / "there.json").write_text("mine")
    lines = ["the river", "", "/help", f"/save {file}", "/nonsense", f"/save {tmp_path / 'there.json'}", "/save"]
    lines += [f"/save {tmp_path / 'no' / 'x.json'}", "/reset", "rose", f"/save {tmp_path / 'two.json'}"]
    lines += ["/quit", "never"]
    args = ("chat", "--model", instruct, "--max-new-tokens", 8, "--temperature", 0, "--context", 100)
    code, out, err = say(monkeypatch, capsys, *args, stdin="\n".join(lines) + "\n")
    assert code == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("talk.json", "two.json"))
    assert [m["role"] for m in first] == ["user", "assistant"] and first[0]["content"] == "the river"
    assert second[0]["content"] == "rose" and len(second) == 2
    assert first[1]["content"] in out and second[1]["content"] in out
    assert (tmp_path / "there.json").read_text() == "mine"
    for words in ("Llama 3's chat format, 100 tokens", "/reset      begin", "[wrote", "no command /nonsense",
                  "exists already: choose another", "/save needs the name", "was not written: No such file",
                  "[a new conversation]"):  # fmt: skip
        assert words in err
    assert len(re.findall(r"\[\d+ tokens, [\d,.]+ a second, the first after [\d.]+ s; \d+ of 100 tokens", err)) == 2
    assert "Traceback" not in err


def test_ctrl_c_stops_the_answer_and_a_second_one_in_a_row_leaves(instruct, monkeypatch, capsys):
    events = iter(["the river", KeyboardInterrupt, "rose", KeyboardInterrupt, KeyboardInterrupt])

    def read_line(terminal):
        event = next(events)
        if event is KeyboardInterrupt:
            raise KeyboardInterrupt
        return event

    monkeypatch.setattr(chat_module, "read_line", read_line)
    with pytest.raises(KeyboardInterrupt):
        run(["chat", "--model", str(instruct), "--max-new-tokens", "4", "--temperature", "0"])
    err = capsys.readouterr().err
    assert err.count("Ctrl-C stops an answer; /quit or a second Ctrl-C leaves") == 2


@pytest.mark.slow
def test_a_real_ctrl_c_in_the_middle_of_an_answer(tmp_path):
    tokenizer = Llama3Tokenizer.train([TEXT], 540)
    make_model(540, 4096, dim=512, n_layers=8).save_pretrained(tmp_path)  # slow enough to be stopped
    tokenizer.save(tmp_path / "tokenizer.model")
    # A shell that starts the tests in the background has them ignore Ctrl-C, and what they start inherits that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = {"start_new_session": True, "preexec_fn": heed}
    process = command("chat", "--model", tmp_path, "--max-new-tokens", 3000, "--temperature", 0, **options)
    process.stdin.write("the river\n")
    process.stdin.flush()
    process.stdout.read(3)  # the answer has begun
    process.send_signal(signal.SIGINT)
    process.stdin.write("/quit\n")
    process.stdin.close()
    out, err = process.stdout.read(), process.stderr.read()
    assert process.wait(60) == 0, err
    assert "[stopped; " in err and "Traceback" not in err and out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "0", "--min-p", "0.1"], "min_p means nothing"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--context", "9000"], "context is 9000; it must be from 16 to the model's own, 128"),
        (["--format", "llama3"], r"no <\|start_header_id\|>, which the format of Llama 3 needs: use --format plain"),
        (["--system", "the river " * 60], "the instructions have .* more than half of the context of 128"),
    ],
)
def test_mistakes_of_chat(base, args, words):
    with pytest.raises(UserError, match=words):
        run(["chat", "--model", str(base), *args])


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "n" * 300])
def test_a_name_that_cannot_be_saved_to_ends_no_conversation(instruct, tmp_path, name):
    conversation = open_chat(instruct)
    with pytest.raises(UserError, match="was not written"):
        chat_module.save(conversation, str(tmp_path / name) if not name.startswith("~") else name)


def test_a_bad_line_takes_no_other_lines_with_it(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9\ntwo\r\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert chat_module.read_line(False) == "one"
    with pytest.raises(UserError, match="no UTF-8"):
        chat_module.read_line(False)
    assert [chat_module.read_line(False) for _ in range(2)] == ["two", None]
