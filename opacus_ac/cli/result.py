"""``opacus-ac chat``, ``generate``, ``merge`` and ``evaluate``: what can be done with the model that a run has left."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from opacus_ac.cli.command import OK, Command, add_format, add_option
from opacus_ac.integrations.trained.folder import RunError, RunFolder

_HELP = """\
Type a message and press Enter.
  /base   the reply of the model as it was before the run, to the same message
  /new    begin a new dialogue
  /quit   end (or Ctrl-D)"""


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a run: of opacus-ac finetune, PrivateTrainer, or an example")
    add_option(
        parser, "base", metavar="MODEL", help="folder or hub name of the base model, where the run's is elsewhere"
    )


def _reply_arguments(parser: argparse.ArgumentParser, temperature: float) -> None:
    add_option(parser, "max-new-tokens", type=int, default=256, help="longest reply, in tokens (default 256)")
    text = f"0 takes the most likely word each time (default {temperature:g})"
    add_option(parser, "temperature", type=float, default=temperature, help=text)


def _load(options: argparse.Namespace) -> Any:
    """Return the model of the run. The folder is looked at before torch is imported."""
    folder = RunFolder.at(options.run).model_folder()
    if folder != Path(options.run):
        print(f"the run has saved no model yet; this is its checkpoint {folder}", file=sys.stderr)
    from transformers.utils import logging

    from opacus_ac.integrations.trained.model import load_run

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_run(options.run, base=options.base)


# ---------------------------------------------------------------- chat


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    _reply_arguments(parser, 0.7)
    add_option(parser, "system", help="system message that every dialogue begins with")


def _chat(options: argparse.Namespace) -> int:
    """Read messages from the terminal, and write replies to it, until the user ends it."""
    run = _load(options)
    print(_HELP, file=sys.stderr)
    start = [{"role": "system", "content": options.system}] if options.system else []
    dialogue = list(start)
    while (line := _next_line()) is not None:
        if line in ("/quit", "/exit"):
            break
        if line == "/new":
            dialogue = list(start)
            print("(a new dialogue)", file=sys.stderr)
        elif line == "/base":
            _say_base(run, dialogue, options)
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            dialogue = [*dialogue, {"role": "user", "content": line}]
            text = _say(run.model, run.tokenizer, dialogue, options)
            dialogue.append({"role": "assistant", "content": text})
    return OK


def _next_line() -> str | None:
    """Return the next line of the user; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _say(model: Any, tokenizer: Any, dialogue: list[dict[str, str]], options: argparse.Namespace) -> str:
    """Write the reply to a dialogue as its tokens come, and return it."""
    from transformers import TextStreamer

    from opacus_ac.integrations.trained.replies import ReplyOptions, chat_ids, write_reply

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    wanted = ReplyOptions(options.max_new_tokens, options.temperature)
    return write_reply(model, tokenizer, chat_ids(dialogue, tokenizer), wanted, streamer)


def _say_base(run: Any, dialogue: list[dict[str, str]], options: argparse.Namespace) -> None:
    """Write the reply of the base model to the last message; the dialogue stays as it is."""
    asked = dialogue[:-1] if dialogue and dialogue[-1]["role"] == "assistant" else dialogue
    if not asked or asked[-1]["role"] != "user":
        print("(write a message first)", file=sys.stderr)
        return
    print("(before the run:)", file=sys.stderr)
    try:
        with run.base() as base:
            _say(base, run.tokenizer, asked, options)
    except RunError as error:
        print(f"({error})", file=sys.stderr)


# ---------------------------------------------------------------- generate


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("prompt", nargs="?", help="a message, or - for the standard input (the default)")
    _reply_arguments(parser, 0.0)
    add_option(parser, "plain", action="store_true", help="continue the prompt as text, instead of replying to it")
    add_option(parser, "compare", action="store_true", help="write the reply of the base model too")
    add_format(parser)


def _generate(options: argparse.Namespace) -> int:
    """Write a reply to one prompt."""
    folder = RunFolder.at(options.run)
    folder.model_folder()
    prompt = sys.stdin.read() if options.prompt in (None, "-") else options.prompt
    if not prompt.strip():
        raise RunError("there is no prompt: give one as the second word, or on the standard input")
    from opacus_ac.integrations.trained.replies import ReplyOptions, chat_ids, write_reply

    wanted = ReplyOptions(options.max_new_tokens, options.temperature)
    run = _load(options)
    message = [{"role": "user", "content": prompt.strip()}]
    ids = run.tokenizer(prompt)["input_ids"] if options.plain else chat_ids(message, run.tokenizer)
    replies = {"reply": write_reply(run.model, run.tokenizer, ids, wanted)}
    if options.compare:
        with run.base() as base:
            replies["before"] = write_reply(base, run.tokenizer, ids, wanted)
    if options.format == "json":
        print(json.dumps({"prompt": prompt, **replies}, indent=2, ensure_ascii=False))
    elif options.compare:
        print(f"before  {replies['before']}\nafter   {replies['reply']}")
    else:
        print(replies["reply"])
    return OK


# ---------------------------------------------------------------- merge


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("out", help="new folder for the merged model")
    text = "type of the merged weights (default float32; bfloat16 is half as large and rounds the adapters)"
    add_option(parser, "dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=text)


def _merge(options: argparse.Namespace) -> int:
    """Write the base model with the adapters in its weights."""
    RunFolder.at(options.run).model_folder()
    import torch

    from opacus_ac.integrations.trained.merge import merge_run

    out = merge_run(options.run, options.out, base=options.base, dtype=getattr(torch, options.dtype))
    print(f"merged into {out}: load it with transformers, or opacus-ac chat {out}")
    return OK


# ---------------------------------------------------------------- evaluate


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    add_option(parser, "data", required=True, metavar="FILE", help="PUBLIC dialogues, in a form that finetune reads")
    add_option(parser, "evaluation-is-public", action="store_true", help="say that --data needs no protection")
    private = "the PRIVATE file of the run, which --data is compared with (default: that of finetune, on its machine)"
    add_option(parser, "train-file", metavar="FILE", help=private)
    add_option(parser, "group-by", metavar="COLUMN", help="column of the user in --train-file, as in training")
    elsewhere = "the private data are not on this machine: compare with nothing, on your word"
    add_option(parser, "unchecked", action="store_true", help=elsewhere)
    add_option(parser, "max-length", type=int, help="tokens per dialogue (default: as in training, otherwise 1024)")
    add_format(parser)


def _evaluate(options: argparse.Namespace) -> int:
    """Print the loss on public data before and after the run."""
    folder = RunFolder.at(options.run)
    if not options.evaluation_is_public:
        raise RunError(
            "a loss on private data would be published without noise: say --evaluation-is-public if --data needs no "
            "protection"
        )
    if not Path(options.data).is_file():
        raise RunError(f"--data {options.data}: there is no such file")
    length = options.max_length or folder.settings.get("max_length") or 1024
    from opacus_ac.integrations.trained.evaluation import losses, read_public

    dialogues = read_public(
        folder,
        options.data,
        train_file=options.train_file,
        group_by=options.group_by,
        unchecked=options.unchecked,
    )
    found = losses(_load(options), dialogues, max_length=length)
    if options.format == "json":
        print(json.dumps({name: vars(loss) for name, loss in found.items()}, indent=2))
        return OK
    print(f"loss on {options.data}, mean over {found['after'].records} dialogues of at most {length} tokens:")
    for name, loss in found.items():
        print(f"{name:7} {loss}")
    if "before" not in found:
        print("(the base model is not at hand: name it with --base for the loss before the run)", file=sys.stderr)
    return OK


COMMANDS = (
    Command("chat", "talk to the model of a run, and compare it with its base", _chat_arguments, _chat),
    Command("generate", "one reply of the model of a run", _generate_arguments, _generate),
    Command("merge", "put the adapters of a run into its base model", _merge_arguments, _merge),
    Command("evaluate", "the loss of the model of a run on PUBLIC dialogues", _evaluate_arguments, _evaluate),
)
