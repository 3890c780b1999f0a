//! What documents mean and what is said about those that mean nothing.

use std::path::PathBuf;

use serde_json::json;

use super::tree::DEPTH_MAX;
use super::*;

mod on_site;

fn yaml(text: &str) -> Result<Spec, Error> {
    parse(text, Format::Yaml)
}

fn complaint(text: &str, format: Format) -> String {
    match parse(text, format) {
        Ok(spec) => panic!("{text:?} was accepted as {spec:?}"),
        Err(error) => error.to_string(),
    }
}

const FULL_YAML: &str = r#"
# Every key that a program can have.
name: full
run: [sh, -c, "echo $0"]
vars: {A: "1", B: ""}
stdin: |
  first
  second
needs: {time: 1h30m}
ok: {exit: [0, 3]}
retry: {max: 4, wait: {first: 30s, factor: 1.5, max: 30m, jitter: 0}}
timeout: {total: 2d, queue: 12h}
priority: -7
queue: big_2-x
hold: true
labels: {campaign: si, "with space": ü}
session: si.2026
at: here
"#;

const FULL_JSON: &str = r#"{
    "at": "here", "session": "si.2026", "labels": {"with space": "\u00fc", "campaign": "si"},
    "hold": true, "queue": "big_2-x", "priority": "low", "timeout": {"queue": "12h", "total": "48h"},
    "retry": {"wait": {"jitter": 0.0, "max": "1800s", "factor": 1.5, "first": "30s"}, "max": 4},
    "ok": {"exit": [0, 3]}, "needs": {"time": "90m"}, "stdin": "first\nsecond\n",
    "vars": {"B": "", "A": "1"}, "run": ["sh", "-c", "echo $0"], "name": "full"
}"#;

const FULL_TOML: &str = r#"
name = "full"
run = ["sh", "-c", "echo $0"]
vars = {A = "1", B = ""}
stdin = """
first
second
"""
needs.time = "1h30m"
ok.exit = [0, 0x3]
priority = -100
queue = "big_2-x"
hold = true
session = "si.2026"
at = "here"

[retry]
max = 4
wait = {first = "30s", factor = 1.5, max = "30m", jitter = 0}

[timeout]
total = "2d"
queue = "12h"

[labels]
campaign = "si"
"with space" = "ü"
"#;

fn full() -> Spec {
    Spec {
        name: Some("full".to_owned()),
        vars: [("A".to_owned(), "1".to_owned()), ("B".to_owned(), String::new())].into(),
        time: Some(Duration::from_secs(5400)),
        ok_exit: vec![0, 3],
        retry: Retry {
            max: 4,
            wait: Wait { first: Duration::from_secs(30), factor: 1.5, max: Duration::from_secs(1800), jitter: 0.0 },
        },
        labels: [("campaign".to_owned(), "si".to_owned()), ("with space".to_owned(), "ü".to_owned())].into(),
        session: Some("si.2026".to_owned()),
        priority: Priority::Low,
        queue: "big_2-x".to_owned(),
        hold: true,
        timeout: Timeout { total: Some(Duration::from_secs(2 * 86_400)), queue: Some(Duration::from_secs(12 * 3600)) },
        stdin: Some("first\nsecond\n".to_owned()),
        ..Spec::new(Work::Run { argv: ["sh", "-c", "echo $0"].map(str::to_owned).to_vec() })
    }
}

const CALL_YAML: &str =
    "call: baton.count\nwith: {advances: 50, every: 100ms, ratio: 0.5, deep: [{a: null}, true, -3, 1.0]}\n";
const CALL_JSON: &str = r#"{"call": "baton.count",
    "with": {"deep": [{"a": null}, true, -3, 1.0], "ratio": 0.5, "every": "100ms", "advances": 50}}"#;

#[test]
fn the_three_notations_and_messages_mean_the_same() {
    for (text, format) in [(FULL_YAML, Format::Yaml), (FULL_JSON, Format::Json), (FULL_TOML, Format::Toml)] {
        let spec = parse(text, format).unwrap();
        assert_eq!(spec, full(), "{format:?}");
        assert_eq!(spec.digest(), full().digest(), "{format:?}");
    }
    assert_eq!(from_json_value(serde_json::from_str(FULL_JSON).unwrap()).unwrap(), full());

    let call = yaml(CALL_YAML).unwrap();
    assert_eq!(call, parse(CALL_JSON, Format::Json).unwrap());
    assert_eq!(call.digest(), parse(CALL_JSON, Format::Json).unwrap().digest());
    let with = json!({"advances": 50, "every": "100ms", "ratio": 0.5, "deep": [{"a": null}, true, -3, 1.0]});
    assert_eq!(call.what, Work::Call { name: "baton.count".to_owned(), with });
    let toml = parse("call = 'x'\nwith = {n = 50, f = 1.0, l = [true, -3]}", Format::Toml).unwrap();
    assert_eq!(toml, yaml("call: x\nwith: {n: 50, f: 1.0, l: [true, -3]}").unwrap());
    assert_eq!(toml.digest(), yaml("{with: {l: [true, -3], f: 1.0, n: 50}, call: x}").unwrap().digest());
}

#[test]
fn what_is_not_said_takes_the_default() {
    let spec = yaml("run: [/usr/bin/true]").unwrap();
    assert_eq!(spec, Spec::new(Work::Run { argv: vec!["/usr/bin/true".to_owned()] }));
    assert_eq!((spec.retry.max, spec.ok_exit.as_slice(), spec.queue.as_str()), (1, [0].as_slice(), "default"));
    assert_eq!(
        (spec.priority, spec.hold, spec.time, spec.timeout),
        (Priority::Normal, false, None, Timeout::default())
    );
    let call = yaml("call: x").unwrap();
    assert_eq!(call.what, Work::Call { name: "x".to_owned(), with: json!({}) });
    assert_eq!(yaml("call: x\nwith: {}").unwrap(), call);
}

#[test]
fn names_kinds_and_queues_follow_from_the_work() {
    for (text, name, kind, queue) in [
        ("run: [/usr/bin/true]", "true", "program", "default"),
        ("{run: [pw.x], priority: high}", "pw.x", "program", "default.high"),
        ("{script: 'echo 1', priority: low}", "script", "program", "default.low"),
        ("{script: 'echo 1', name: n, priority: normal, queue: big}", "n", "program", "big"),
        ("{call: baton.count, priority: 1, queue: big}", "baton.count", "baton.count", "big.high"),
        ("{call: baton.count, priority: 0, name: n}", "n", "baton.count", "default"),
        ("{call: baton.count, priority: -1}", "baton.count", "baton.count", "default.low"),
    ] {
        let spec = yaml(text).unwrap();
        assert_eq!((spec.effective_name(), spec.kind(), spec.task_queue().as_str()), (name, kind, queue), "{text}");
    }
}

#[test]
fn a_pause_grows_to_its_limit_and_chance_shortens_it() {
    let wait = |text: &str| yaml(&format!("run: [x]\nretry: {{max: 9, wait: {text}}}")).unwrap().retry.wait;
    let seconds = Duration::from_secs;
    assert_eq!(wait("30s"), Wait::constant(seconds(30)));
    assert_eq!(wait("{}"), Wait::default());
    assert_eq!(wait("{first: 1h}").max, seconds(3600));
    assert_eq!(wait("{max: 100ms}").first, Duration::from_millis(100));

    let growing = wait("{first: 10s, factor: 3, max: 2m, jitter: 0.5}");
    let table = [(0, 10), (1, 10), (2, 30), (3, 90), (4, 120), (5, 120), (u32::MAX, 120)];
    for (attempt, pause) in table {
        assert_eq!(growing.before(attempt, 0.0), seconds(pause), "{attempt}");
        assert_eq!(growing.before(attempt, 1.0), seconds(pause) / 2, "{attempt}");
        assert_eq!(Wait::constant(seconds(30)).before(attempt, 0.7), seconds(30));
    }
}

#[test]
fn a_script_has_unix_lines_whatever_its_document_has() {
    let documents = [
        ("script = '''\r\n#!/bin/sh\r\necho a\r\n'''\r\n".to_owned(), Format::Toml),
        ("{\"script\": \"#!/bin/sh\\r\\necho a\\r\\n\"}".to_owned(), Format::Json),
        ("script: |\r\n  #!/bin/sh\r\n  echo a\r\n".to_owned(), Format::Yaml),
        ("script: \"#!/bin/sh\\r\\necho a\\r\\n\"\n".to_owned(), Format::Yaml),
    ];
    for (text, format) in documents {
        let spec = parse(&text, format).unwrap();
        assert_eq!(spec.what, Work::Script { text: "#!/bin/sh\necho a\n".to_owned() }, "{text}");
    }
}

#[test]
fn a_spec_survives_messagepack_and_json() {
    for spec in [full(), yaml(CALL_YAML).unwrap(), yaml("script: |\n  a\n  b").unwrap(), yaml("run: [x]").unwrap()] {
        let bytes = rmp_serde::to_vec_named(&spec).unwrap();
        assert_eq!(rmp_serde::from_slice::<Spec>(&bytes).unwrap(), spec);
        let text = serde_json::to_string(&spec).unwrap();
        let back: Spec = serde_json::from_str(&text).unwrap();
        assert_eq!((back.digest(), back), (spec.digest(), spec));
    }
}

#[test]
fn older_and_newer_serialized_specs_are_read() {
    let what = json!({"run": {"argv": ["x"]}});
    let expected = yaml("run: [x]").unwrap();
    for stored in [
        json!({"what": what}),
        json!({"what": what, "retry": {}, "timeout": {}, "name": null, "later": {"a": [1]}}),
        json!({"what": what, "retry": {"max": 1, "wait": {"factor": 2.0, "later": 1}}}),
    ] {
        assert_eq!(serde_json::from_value::<Spec>(stored.clone()).unwrap(), expected);
        let bytes = rmp_serde::to_vec_named(&stored).unwrap();
        assert_eq!(rmp_serde::from_slice::<Spec>(&bytes).unwrap(), expected);
    }
}

#[test]
fn the_digest_differs_when_anything_differs() {
    let documents = [
        "run: [x]",
        "run: [x, x]",
        "run: [xx]",
        "script: x",
        "call: x",
        "{call: x, with: 1}",
        "{call: x, with: 1.0}",
        "{call: x, with: '1'}",
        "{call: x, with: {a: [b]}}",
        "{call: x, with: {a: b}}",
        "{run: [x], name: x}",
        "{run: [x], vars: {a: b}}",
        "{run: [x], labels: {a: b}}",
        "{run: [x], session: x}",
        "{run: [x], stdin: ''}",
        "{run: [x], stdin: x}",
        "{run: [x], needs: {time: 1s}}",
        "{run: [x], ok: {exit: [1]}}",
        "{run: [x], ok: {exit: [0, 1]}}",
        "{run: [x], retry: {max: 2}}",
        "{run: [x], retry: {wait: 1s}}",
        "{run: [x], retry: {wait: {first: 2s}}}",
        "{run: [x], retry: {wait: {factor: 3}}}",
        "{run: [x], retry: {wait: {max: 2m}}}",
        "{run: [x], retry: {wait: {jitter: 1}}}",
        "{run: [x], timeout: {total: 1s}}",
        "{run: [x], timeout: {queue: 1s}}",
        "{run: [x], priority: high}",
        "{run: [x], priority: low}",
        "{run: [x], queue: x}",
        "{run: [x], hold: true}",
    ];
    let digests: std::collections::BTreeSet<_> =
        documents.iter().map(|text| yaml(text).unwrap_or_else(|error| panic!("{text}: {error}")).digest()).collect();
    assert_eq!(digests.len(), documents.len());
    // What is written out although it is the default, and comments, do not count.
    let written = "# x\nrun: [x]\nretry: {max: 1}\nok: {exit: [0]}\nqueue: default\nhold: false\nlabels: {}";
    assert_eq!(yaml(written).unwrap().digest(), yaml("run: [x]").unwrap().digest());
}

/// Digests are stored: this test fails when a change of the serialized form changes them.
#[test]
fn digests_stay_as_they_are() {
    let hex = |spec: Spec| spec.digest().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex(yaml("run: [x]").unwrap()), "5d42d3c07a9f9c4061abbd9eb82b882d5bab114d8ef4c46456535b2c49696494");
    assert_eq!(hex(full()), "4fb43264fbcbb5a94b43693765a4fa9721f4d15cdc2c46766759a74629e816ef");
}

#[test]
fn each_mistake_is_told_with_its_line_and_its_remedy() {
    for (text, expected) in [
        // Keys.
        ("name: x\n\nrnu: [x]", "line 3: unknown key `rnu`; did you mean `run`?"),
        ("run: [x]\nretry:\n  maax: 3", "line 3: unknown key `retry.maax`; did you mean `retry.max`?"),
        (
            "run: [x]\nretry:\n  wait:\n    frist: 3s",
            "line 4: unknown key `retry.wait.frist`; did you mean `retry.wait.first`?",
        ),
        ("run: [x]\ntime: 2h", "line 2: unknown key `time`; did you mean `needs.time`?"),
        ("run: [x]\nok: {zzzzzz: 1}", "line 2: unknown key `ok.zzzzzz`; `ok` has exit"),
        ("run: [x]\nneeds: {disk: 1GiB}", "line 2: `needs.disk` is not supported by this version"),
        ("run: [x]\nretry: {rules: []}", "line 2: `retry.rules` is not supported by this version"),
        ("run: [x]\nname:", "line 2: `name` has no value; give one or remove the key"),
        ("run: [x]\nneeds: 2h", "line 2: `needs` must be a map (with time, nodes, ranks, cpus, mem, gpus), not text"),
        // The work.
        ("name: x", "one of `run`, `script` and `call` is needed; the document has none of them"),
        ("# x", "the document is empty; it needs one of `run`, `script` and `call`"),
        ("[run, x]", "the document is a list; it must be a map of keys"),
        ("run: [x]\nscript: x", "line 2: exactly one of `run`, `script` and `call` is needed, not `run` and `script`"),
        (
            "run: x y",
            "line 1: `run` must be a list of texts such as [echo, hello], not text; text for the shell goes into `script`",
        ),
        ("run: []", "line 1: `run` must not be empty; its first text is the program"),
        ("run: ['', x]", "line 1: `run` must not begin with an empty text; the first is the program"),
        (
            "run:\n- sleep\n- 5",
            "line 1: `run` has an argument 1 (line 3) that must be text, not a number; put quotes around it",
        ),
        (
            "run: [\"a\\0\"]",
            "line 1: `run` has an argument 0 (line 1) that must not contain a NUL byte; no program can be given one",
        ),
        ("script: ' '", "line 1: `script` must not be blank"),
        ("script: \"a\\0\"", "line 1: `script` must not contain a NUL byte; no program can be given one"),
        ("call: a b", "line 1: `call` must be 1 to 128 of A-Z, a-z, 0-9, `.`, `_` and `-`"),
        ("call: job", "line 1: `call` must not be `job`, which is the kind of `run` and `script`"),
        ("call: program", "line 1: `call` must not be `program`, which is the kind of `run` and `script`"),
        // Keys without effect.
        ("call: x\nstdin: a", "line 2: `stdin` applies to `run` and `script` only"),
        ("call: x\nvars: {}", "line 2: `vars` applies to `run` and `script` only"),
        ("call: x\nneeds: {}", "line 2: `needs` applies to `run` and `script` only"),
        ("call: x\nok: {}", "line 2: `ok` applies to `run` and `script` only"),
        ("run: [x]\nwith: {}", "line 2: `with` applies to `call` only"),
        // Values.
        ("run: [x]\nname: ''", "line 2: `name` must be 1 to 128 bytes of text on one line"),
        // A hint with the value would name another one: 3.1, and 7.
        ("run: [x]\nname: 3.10", "line 2: `name` must be text, not a number; put quotes around it"),
        ("run: [x]\nname: 007", "line 2: `name` must be text, not a number; put quotes around it"),
        ("run: [x]\nsession: ..", "line 2: `session` must name a folder of its own; \"..\" does not"),
        ("run: [x]\nsession: .", "line 2: `session` must name a folder of its own; \".\" does not"),
        (
            "run: [x]\nat: a\nnative: {outp: x}",
            "line 3: the key `native.outp` is not for `native`: Baton sets or forbids `output`, by which it finds the job again",
        ),
        ("run: [x]\nsession: a/b", "line 2: `session` must be 1 to 128 of A-Z, a-z, 0-9, `.`, `_` and `-`"),
        ("run: [x]\nqueue: a.high", "line 2: `queue` must be 1 to 64 of a-z, 0-9, `_` and `-`"),
        ("run: [x]\nqueue: Big", "line 2: `queue` must be 1 to 64 of a-z, 0-9, `_` and `-`"),
        ("run: [x]\nhold: yes", "line 2: `hold` must be true or false, not text"),
        (
            "run: [x]\npriority: urgent",
            "line 2: `priority` must be high, normal or low, or a whole number from -100 to 100, of which the sign counts",
        ),
        (
            "run: [x]\npriority: 101",
            "line 2: `priority` must be high, normal or low, or a whole number from -100 to 100, of which the sign counts",
        ),
        ("run: [x]\nvars:\n  A: 1", "line 3: `vars.A` must be text, not a number; put quotes around it"),
        ("run: [x]\nvars:\n  A: true", "line 3: `vars.A` must be text, not a boolean; put quotes around it: \"true\""),
        ("run: [x]\nvars:\n  A:", "line 3: `vars.A` must be text, not nothing"),
        (
            "run: [x]\nvars: {A=B: x}",
            "line 2: the key `vars.A=B` is not the name of a variable; it must not be empty nor contain `=` or a NUL byte",
        ),
        (
            "run: [x]\nvars: {'': x}",
            "line 2: the key `vars.` is not the name of a variable; it must not be empty nor contain `=` or a NUL byte",
        ),
        ("run: [x]\nvars: {A: \"\\0\"}", "line 2: `vars.A` must not contain a NUL byte; no program can be given one"),
        ("run: [x]\nvars: [a]", "line 2: `vars` must be a map from text to text, not a list"),
        ("run: [x]\nlabels: {a: ''}", "line 2: `labels.a` must have 1 to 128 bytes; it has 0"),
        ("run: [x]\nlabels: {'': a}", "line 2: the key `labels.` must have 1 to 128 bytes; it has 0"),
        ("run: [x]\nlabels: {a: 2026}", "line 2: `labels.a` must be text, not a number; put quotes around it"),
        ("run: [x]\nok: {exit: []}", "line 2: `ok.exit` must be a list of at least one whole number from 0 to 255"),
        ("run: [x]\nok: {exit: [256]}", "line 2: `ok.exit` must be a list of at least one whole number from 0 to 255"),
        ("run: [x]\nok: {exit: [-1]}", "line 2: `ok.exit` must be a list of at least one whole number from 0 to 255"),
        ("run: [x]\nok: {exit: 0}", "line 2: `ok.exit` must be a list of exit codes such as [0, 1], not a number"),
        // Durations and retries.
        ("run: [x]\nneeds: {time: 30}", "line 2: `needs.time` is wrong: `30` has no unit; write `30s` for seconds"),
        ("run: [x]\ntimeout: {total: 0s}", "line 2: `timeout.total` must be longer than nothing and at most ten years"),
        (
            "run: [x]\ntimeout: {queue: 3651d}",
            "line 2: `timeout.queue` must be longer than nothing and at most ten years",
        ),
        (
            "run: [x]\nretry: {max: 0}",
            "line 2: `retry.max` must be a whole number from 1 to 1000: the total number of tries",
        ),
        (
            "run: [x]\nretry: {max: -1}",
            "line 2: `retry.max` must be a whole number from 1 to 1000: the total number of tries",
        ),
        (
            "run: [x]\nretry: {max: 1001}",
            "line 2: `retry.max` must be a whole number from 1 to 1000: the total number of tries",
        ),
        (
            "run: [x]\nretry: {max: 1.5}",
            "line 2: `retry.max` must be a whole number from 1 to 1000: the total number of tries",
        ),
        ("run: [x]\nretry: {wait: {factor: 0.5}}", "line 2: `retry.wait.factor` must be a number from 1 to 1000"),
        ("run: [x]\nretry: {wait: {jitter: 1.1}}", "line 2: `retry.wait.jitter` must be a number from 0 to 1"),
        ("run: [x]\nretry: {wait: {jitter: -0.1}}", "line 2: `retry.wait.jitter` must be a number from 0 to 1"),
        (
            "run: [x]\nretry: {wait: {first: 2m, max: 1m}}",
            "line 2: `retry.wait.first` is longer than `retry.wait.max` (2m, 1m)",
        ),
        ("run: [x]\nretry: {wait: 30}", "line 2: `retry.wait` is wrong: `30` has no unit; write `30s` for seconds"),
        (
            "run: [x]\nretry: {wait: [30]}",
            "line 2: `retry.wait` must be a map (with first, factor, max, jitter), not a list",
        ),
    ] {
        assert_eq!(complaint(text, Format::Yaml), expected, "{text}");
    }
    assert!(
        complaint("run: [x]\nneeds: {time: -5s}", Format::Yaml)
            .starts_with("line 2: `needs.time` is wrong: `-5s` is not")
    );
    assert!(
        complaint("run: [x]\nneeds: {time: -5}", Format::Yaml)
            .starts_with("line 2: `needs.time` is wrong: `-5` is not")
    );
    let long = "x".repeat(129);
    assert!(complaint(&format!("run: [x]\nlabels: {{a: {long}}}"), Format::Yaml).contains("it has 129"));
    assert!(complaint(&format!("run: [x]\nqueue: {long}"), Format::Yaml).contains("1 to 64"));
}

#[test]
fn every_key_of_later_versions_is_refused_by_name() {
    for key in ["envs", "defaults", "steps", "env", "resume", "on_failure", "keep", "notify", "after", "each"] {
        let expected = format!("line 2: `{key}` is not supported by this version");
        assert_eq!(complaint(&format!("run: [x]\n{key}: {{a: b}}"), Format::Yaml), expected);
        assert_eq!(complaint(&format!("run = ['x']\n{key} = {{a = 'b'}}"), Format::Toml), expected);
        assert_eq!(complaint(&format!("{{\"run\": [\"x\"],\n\"{key}\": {{\"a\": \"b\"}}}}"), Format::Json), expected);
    }
    for (map, keys) in [
        ("needs", ["disk", "variants"].as_slice()),
        ("retry", ["rules", "avoid"].as_slice()),
        ("ok", ["files"].as_slice()),
    ] {
        for key in keys {
            let expected = format!("line 3: `{map}.{key}` is not supported by this version");
            assert_eq!(complaint(&format!("run: [x]\n{map}:\n  {key}: [a]"), Format::Yaml), expected);
        }
    }
    // The missing `run` is not held against a workflow.
    assert_eq!(complaint("steps: {a: {run: [x]}}", Format::Yaml), "line 1: `steps` is not supported by this version");
}

#[test]
fn all_that_means_nothing_is_told_at_once_in_every_notation() {
    let expected = "line 2: `env` is not supported by this version\n\
                    line 3: unknown key `rnu`; did you mean `run`?\n\
                    line 5: `retry.max` must be a whole number from 1 to 1000: the total number of tries\n\
                    line 6: `queue` must be 1 to 64 of a-z, 0-9, `_` and `-`";
    let toml = "script = 'x'\nenv = 'a'\nrnu = ['x']\n[retry]\nmax = 0\n";
    let toml = toml.replace("[retry]\nmax = 0\n", "\nretry.max = 0\nqueue = 'A'");
    for (text, format) in [
        ("script: x\nenv: a\nrnu: [x]\nretry:\n  max: 0\nqueue: A\n", Format::Yaml),
        (
            "{\"script\": \"x\",\n\"env\": \"a\",\n\"rnu\": [\"x\"],\n\"retry\": {\n\"max\": 0},\n\"queue\": \"A\"}",
            Format::Json,
        ),
        (toml.as_str(), Format::Toml),
    ] {
        let error = parse(text, format).unwrap_err();
        assert_eq!(error.to_string(), expected, "{format:?}");
        assert_eq!(error.problems().len(), 4);
    }
    let value = json!({"script": "x", "env": "a", "queue": "A"});
    assert_eq!(
        from_json_value(value).unwrap_err().to_string(),
        "`env` is not supported by this version\n`queue` must be 1 to 64 of a-z, 0-9, `_` and `-`"
    );
}

#[test]
fn what_cannot_be_read_is_told_with_its_place() {
    let twice = |key: &str| format!("the key `{key}` stands here twice; keep one of them");
    let finite = "infinite numbers and NaN are not supported";
    for (text, format, place, expected) in [
        ("run: [x]\nname: a\nname: b", Format::Yaml, "line 3, column 1", twice("name").as_str()),
        ("run = ['x']\nname = 'a'\nname = 'b'", Format::Toml, "line 3, column 1", "duplicate key"),
        ("{\"run\": [\"x\"],\n \"name\": \"a\",\n \"name\": \"b\"}", Format::Json, "line 3, column 8", &twice("name")),
        ("call: x\nwith:\n  a: 1\n  a: 2", Format::Yaml, "line 4, column 3", &twice("a")),
        ("{\"call\": \"x\", \"with\": {\"a\": 1,\n\"a\": 2}}", Format::Json, "line 2, column 4", &twice("a")),
        (
            "run: [x]\n---\nrun: [y]\n",
            Format::Yaml,
            "line 3, column 1",
            "a second document begins here; one document is one process: give each process a file of its own",
        ),
        ("run: [x", Format::Yaml, "line 1, column 6", "unclosed bracket '['"),
        (
            "run: [x]\n  name: a",
            Format::Yaml,
            "line 2, column 3",
            "while parsing a block mapping, did not find expected key",
        ),
        ("run: *x", Format::Yaml, "line 1, column 6", "reference to unknown value"),
        ("call: x\nwith: &a [*a]", Format::Yaml, "line 2, column 11", "an alias contains itself"),
        (
            "labels: &a {x: y}\nvars: {<<: *a}",
            Format::Yaml,
            "line 2, column 8",
            "merge keys (`<<`) are not supported; write the keys out",
        ),
        ("run: !python/object [x]", Format::Yaml, "line 1, column 21", "unsupported tag `!python/object`"),
        ("call: x\nwith: .inf", Format::Yaml, "line 2, column 7", finite),
        ("call = 'x'\nwith = inf", Format::Toml, "line 2", finite),
        ("call = 'x'\nwith = 2026-01-01", Format::Toml, "line 2", "a date is given as text; put quotes around it"),
        (
            "call = 'x'\nwith = 99999999999999999999",
            Format::Toml,
            "line 2",
            "the number 99999999999999999999 is too large",
        ),
        ("run = [x]", Format::Toml, "line 1, column 8", "string values must be quoted, expected literal string"),
        ("{\"run\": [\"x\"],\n}", Format::Json, "line 2, column 1", "trailing comma"),
        ("", Format::Json, "line 1, column 1", "EOF while parsing a value"),
        ("{\"run\": [\"x\"]} {}", Format::Json, "line 1, column 16", "trailing characters"),
    ] {
        let error = parse(text, format).expect_err(text);
        assert_eq!(error.to_string(), format!("{place}: {expected}"), "{text}");
        assert_eq!(error.problems().len(), 1, "{text}");
    }
}

#[test]
fn what_users_write_cannot_break_an_error_into_lines_nor_reach_a_terminal() {
    for (text, format) in [
        ("{\"run\": [\"x\"], \"a\\u001b[2J\\nb\": 1}", Format::Json),
        ("{\"run\": [\"x\"], \"a\\u001b\\n\": 1, \"a\\u001b\\n\": 1}", Format::Json),
        ("run: [x]\n\"a\\e\\nb\": 1", Format::Yaml),
        ("run: [x]\nat: \"a\\e\\nb\"", Format::Yaml),
        ("run: [x]\n\"a\\e\\nb\": 1\n\"a\\e\\nb\": 1", Format::Yaml),
        ("run = ['x']\n\"a\\u001b\\nb\" = 1", Format::Toml),
    ] {
        let found = complaint(text, format);
        assert!(!found.contains(char::is_control), "{found:?}");
    }
}

#[test]
fn bombs_are_refused() {
    let mut bomb = "call: x\nwith:\n  a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for (name, before) in ["b", "c", "d", "e", "f", "g", "h", "i"].into_iter().zip("abcdefgh".chars()) {
        let aliases = vec![format!("*{before}"); 10].join(", ");
        bomb.push_str(&format!("  {name}: &{name} [{aliases}]\n"));
    }
    let found = complaint(&bomb, Format::Yaml);
    assert!(found.contains("at most 1 MiB"), "{found}");

    let fat = format!("call: x\nwith:\n- &a {}\n{}", "x".repeat(100_000), "- *a\n".repeat(20));
    let found = complaint(&fat, Format::Yaml);
    assert!(found.contains("at most 1 MiB"), "{found}");

    for depth in [DEPTH_MAX - 1, DEPTH_MAX, 100, 10_000] {
        let nested = format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        for (text, format) in [
            (format!("call: x\nwith: {nested}"), Format::Yaml),
            (format!("{{\"call\": \"x\", \"with\": {nested}}}"), Format::Json),
            (format!("call = 'x'\nwith = {nested}"), Format::Toml),
        ] {
            assert_eq!(parse(&text, format).is_ok(), depth < DEPTH_MAX, "{depth} {format:?}");
        }
    }
    let value = (0..DEPTH_MAX).fold(json!(1), |value, _| json!([value]));
    let found = from_json_value(json!({"call": "x", "with": value})).unwrap_err().to_string();
    assert_eq!(found, "the document is nested more than 24 levels deep");

    // Linux takes 131,072 bytes with the NUL at the end, and a variable with its name.
    let long = "x".repeat(131_072);
    let found = complaint(&format!("run: [echo, {long}]"), Format::Yaml);
    assert!(found.contains("an argument 1 (line 1) that has 131072 bytes") && found.contains("`stdin`"), "{found}");
    let found = complaint(&format!("run: [x]\nvars: {{A: {}}}", &long[2..]), Format::Yaml);
    assert!(found.contains("`vars.A` has 131072 bytes"), "{found}");
    assert!(yaml(&format!("run: [echo, {}]\nvars: {{A: {}}}", &long[1..], &long[3..])).is_ok());

    let large = format!("script: |\n  {}", "x".repeat(1024 * 1024));
    assert!(complaint(&large, Format::Yaml).contains("at most 1 MiB"));
    let value = json!({"script": "x".repeat(1024 * 1024)});
    assert!(from_json_value(value).unwrap_err().to_string().contains("larger than 1 MiB"));
    assert!(yaml(&format!("script: |\n  {}", "x".repeat(1_000_000))).is_ok());
}

#[test]
fn the_extension_tells_the_notation() {
    for (path, format) in [
        ("a.json", Format::Json),
        ("a.JSON", Format::Json),
        ("dir.json/a.toml", Format::Toml),
        ("a.yaml", Format::Yaml),
        ("a.yml", Format::Yaml),
        ("a", Format::Yaml),
        ("-", Format::Yaml),
    ] {
        assert_eq!(Format::of_path(Path::new(path)), format, "{path}");
    }
    assert_eq!(parse("\u{feff}{\"run\": [\"x\"]}", Format::Json).unwrap(), yaml("\u{feff}run: [x]").unwrap());
}

#[test]
fn every_example_is_a_spec() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples");
    for (file, name, kind) in [
        ("hello.yaml", "hello", "program"),
        ("count.yaml", "count", "baton.count"),
        ("retry.toml", "retry", "program"),
        ("python.json", "python", "program"),
    ] {
        let path = directory.join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        let spec = parse(&text, Format::of_path(&path)).unwrap_or_else(|error| panic!("{file}:\n{error}"));
        assert_eq!((spec.effective_name(), spec.kind()), (name, kind), "{file}");
    }
}
