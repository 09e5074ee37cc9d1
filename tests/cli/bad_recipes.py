"""Broken recipes and words."""

from __future__ import annotations

from broken_house import CORPUS, Prepare

DATA = "stage: data\nout: out/data\nsource: jsonl:corpus.jsonl\n"

# kind → (how to break it and what to call, what the sentence says: the place, and what is wrong)
RECIPES: dict[str, tuple[Prepare, str]] = {
    "not YAML": (lambda r: r.recipe("a: [1,\nb: 2"), r"recipe\.yaml:2:\d+: not valid YAML"),
    "tabs": (
        lambda r: r.recipe("stage: data\nfactbook:\n\tdocuments: 5\n"),
        r"recipe\.yaml:3:1: .*; indent with spaces",
    ),
    "a list": (
        lambda r: r.recipe("- a\n"),
        r"recipe\.yaml: a recipe is a mapping .*holds a list; recipes/",
    ),
    "empty": (lambda r: r.recipe(""), r"recipe\.yaml: the recipe is empty"),
    "not UTF-8": (
        lambda r: r.recipe(DATA.encode() + b"# \xff"),
        r"recipe\.yaml: byte \d+ is not UTF-8; save",
    ),
    "UTF-16": (lambda r: r.recipe(DATA.encode("utf-16")), r"recipe\.yaml: byte 0 is not UTF-8; save"),
    "NUL": (lambda r: r.recipe(DATA + "a: \0\n"), r"recipe\.yaml: not valid YAML .*; save"),
    "missing": (lambda r: ["run", "no.yaml"], r"no\.yaml: no such recipe; recipes/"),
    "a directory": (lambda r: ["run", "runs"], r"runs: is a directory, expected a recipe file"),
    "under a file": (
        lambda r: ["run", f"{r.write('a', b'')}/b.yaml"],
        r"a/b\.yaml: cannot be read .*; check the path",
    ),
    "duplicate key": (lambda r: r.recipe(DATA + "out: x\n"), r"recipe\.yaml:4:1: .*key 'out' stands twice"),
    "alias": (lambda r: r.recipe("stage: &a data\nout: *a\n"), r"recipe\.yaml:2:6: .*aliases"),
    "unknown key": (
        lambda r: r.recipe(DATA + "cut_char: 3\n"),
        r"unknown key 'cut_char'; did you mean 'cut_chars'",
    ),
    "unknown key in a block": (
        lambda r: r.recipe(DATA + "factbook: {docs: 3}\n"),
        r"unknown key 'factbook\.docs'; did you mean 'documents'",
    ),
    "missing key": (
        lambda r: r.recipe("stage: pretrain\nout: out/t\n"),
        r"recipe\.yaml: .*key 'shards' is missing; add",
    ),
    "no place": (lambda r: r.recipe("stage: data\n"), r"recipe\.yaml: key 'out' is missing; add"),
    "neither stage nor stages": (
        lambda r: r.recipe("out: x\n"),
        r"recipe\.yaml: has neither 'stages:' .*stage types",
    ),
    "unknown stage": (
        lambda r: r.recipe("stages: [{stage: pretran}]"),
        r"entry 1: .*'pretran'; did you mean 'pretrain'",
    ),
    "a stage's name leaves the run": (
        lambda r: r.recipe("stages: [{stage: data, name: ../../x}]"),
        r"entry 1: name '\.\./\.\./x' cannot",
    ),
    "two stages of one name": (
        lambda r: r.recipe("stages: [{stage: data}, {stage: data}]"),
        r"entry 2: a second stage",
    ),
    "unknown input name": (
        lambda r: r.pipeline("tokenizer.data=dta"),
        r"tokenizer\.data: 'dta' is no earlier stage; did",
    ),
    "input of a later stage": (
        lambda r: r.recipe("stages: [{stage: tokenizer, data: data}, {stage: data}]"),
        r"tokenizer\.data: .*move it up",
    ),
    "input is no artifact": (
        lambda r: r.stage("tokenizer", data="./none"),
        r"\./none: no manifest\.json there.*; check",
    ),
    "input of another kind": (
        lambda r: r.stage("tokenize", data="runs/data", tokenizer="runs/scores"),
        r"runs/scores: is of kind scores, but .tokenizer. takes tokenizer or model; give",
    ),
    "wrong type": (
        lambda r: r.corpus(CORPUS, min_chars="many"),
        r"recipe\.yaml: .*min_chars: .*\(found 'many'\)",
    ),
    "a list for a number": (lambda r: r.corpus(CORPUS, min_chars=[1]), r"min_chars: .*\(found \[1\]\)"),
    "out of range": (
        lambda r: r.corpus(CORPUS, test_share=1.5),
        r"test_share: .*less than 1 .*\(found 1\.5\)",
    ),
    "infinite": (lambda r: r.recipe(DATA + "test_share: .inf\n"), r"test_share: .*finite.*\(found inf\)"),
    "both shares together": (
        lambda r: r.corpus(CORPUS, test_share=0.6, validation_share=0.5),
        r"test_share.*; ",
    ),
    "vocabulary too small": (
        lambda r: r.stage("tokenizer", data="runs/data", vocab_size=10),
        r"vocab_size 10 is too small.*; set vocab_size",
    ),
    "override without =": (
        lambda r: r.pipeline("data.min_chars"),
        r"override 'data\.min_chars': expected key=value",
    ),
    "override of an unknown stage": (
        lambda r: r.pipeline("dta.strict=true"),
        r"'dta' is neither .*; did you mean 'data'",
    ),
    "override of an unknown key": (
        lambda r: r.pipeline("data.stict=true"),
        r"unknown key 'stict'; did you mean 'strict'",
    ),
    "override of a stage": (
        lambda r: r.pipeline("data=3"),
        r"override 'data=3': 'data' is a stage; write data\.KEY",
    ),
    "override of a value's part": (
        lambda r: r.pipeline("data.source.x=1"),
        r"override '.*source\.x=1': 'source' is a value, not a block",
    ),
    "override that is not YAML": (
        lambda r: r.pipeline("data.strict={"),
        r"override '.*strict=\{'.*: not valid YAML",
    ),
    "a recipe of another stage": (
        lambda r: ["sft", r.stage("merge", model="a", adapter="b")[1]],
        r"recipe\.yaml: is a recipe of stage 'merge'",
    ),
    "a pipeline without the stage": (
        lambda r: ["pretrain", r.pipeline()[1]],
        r"recipe\.yaml: holds no stage of type 'pretrain'",
    ),
}
