//! What documents mean.

use std::path::PathBuf;

use serde_json::json;

use super::*;

mod mistakes;
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
fn the_three_formats_and_messages_are_equivalent() {
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
fn absent_keys_have_their_defaults() {
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
fn the_work_determines_name_kind_and_queue() {
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
fn a_pause_grows_to_its_limit_and_jitter_shortens_it() {
    let wait = |text: &str| yaml(&format!("run: [x]\nretry: {{max: 9, wait: {text}}}")).unwrap().retry.wait;
    let seconds = Duration::from_secs;
    assert_eq!(wait("30s"), Wait::constant(seconds(30)));
    assert_eq!(wait("{}"), Wait::default());
    assert_eq!(wait("{first: 1h}").max, seconds(3600));
    assert_eq!(wait("{max: 100ms}").first, Duration::from_millis(100));

    let growing = wait("{first: 10s, factor: 3, max: 2m, jitter: 0.5}");
    let table = [(0, 10), (1, 10), (2, 30), (3, 90), (4, 120), (5, 120), (u32::MAX, 120)];
    for (try_number, pause) in table {
        assert_eq!(growing.before(try_number, 0.0), seconds(pause), "{try_number}");
        assert_eq!(growing.before(try_number, 1.0), seconds(pause) / 2, "{try_number}");
        assert_eq!(Wait::constant(seconds(30)).before(try_number, 0.7), seconds(30));
    }
}

#[test]
fn a_script_has_unix_line_breaks_whatever_the_document_has() {
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
fn a_spec_round_trips_through_messagepack_and_json() {
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
fn every_difference_changes_the_digest() {
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
    // Explicit defaults and comments do not change the digest.
    let written = "# x\nrun: [x]\nretry: {max: 1}\nok: {exit: [0]}\nqueue: default\nhold: false\nlabels: {}";
    assert_eq!(yaml(written).unwrap().digest(), yaml("run: [x]").unwrap().digest());
}

/// Digests are stored. This test fails if a change of the serialized form changes them.
#[test]
fn digests_do_not_change() {
    let hex = |spec: Spec| spec.digest().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex(yaml("run: [x]").unwrap()), "5d42d3c07a9f9c4061abbd9eb82b882d5bab114d8ef4c46456535b2c49696494");
    assert_eq!(hex(full()), "4fb43264fbcbb5a94b43693765a4fa9721f4d15cdc2c46766759a74629e816ef");
}

#[test]
fn the_extension_determines_the_format() {
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
