//! The problems that are reported about documents.

use super::super::tree::DEPTH_MAX;
use super::*;

fn assert_complaints(cases: &[(&str, &str)]) {
    for (text, expected) in cases {
        assert_eq!(complaint(text, Format::Yaml), *expected, "{text}");
    }
}

#[test]
fn a_problem_with_the_keys_or_the_work_is_reported_with_line_and_remedy() {
    assert_complaints(&[
        // Keys.
        ("name: x\n\nrnu: [x]", "line 3: unknown key `rnu`; did you mean `run`?"),
        ("run: [x]\nretry:\n  maax: 3", "line 3: unknown key `retry.maax`; did you mean `retry.max`?"),
        (
            "run: [x]\nretry:\n  wait:\n    frist: 3s",
            "line 4: unknown key `retry.wait.frist`; did you mean `retry.wait.first`?",
        ),
        ("run: [x]\ntime: 2h", "line 2: unknown key `time`; did you mean `needs.time`?"),
        ("run: [x]\nok: {zzzzzz: 1}", "line 2: unknown key `ok.zzzzzz`; the known keys of `ok`: exit"),
        ("run: [x]\nneeds: {disk: 1GiB}", "line 2: `needs.disk` is not supported by this version"),
        ("run: [x]\nretry: {rules: []}", "line 2: `retry.rules` is not supported by this version"),
        ("run: [x]\nname:", "line 2: `name` has no value; add a value or remove the key"),
        (
            "run: [x]\nneeds: 2h",
            "line 2: `needs` must be a map with the keys time, nodes, ranks, cpus, mem, gpus, not text",
        ),
        // The work.
        ("name: x", "the document has none of `run`, `script` and `call`; add one"),
        ("# x", "the document is empty; add one of `run`, `script` and `call`"),
        ("[run, x]", "the document is a list; it must be a map of keys"),
        (
            "run: [x]\nscript: x",
            "line 2: the document has `run` and `script`; keep exactly one of `run`, `script` and `call`",
        ),
        ("run: x y", "line 1: `run` must be a list such as [echo, hello], not text; use `script` for a shell command"),
        ("run: []", "line 1: `run` must not be empty; its first element is the program"),
        ("run: ['', x]", "line 1: `run` must not start with an empty string; the first element is the program"),
        ("run:\n- sleep\n- 5", "line 1: `run` argument 1 (line 3) must be text, not a number; put quotes around it"),
        (
            "run: [\"a\\0\"]",
            "line 1: `run` argument 0 (line 1) must not contain a NUL byte; programs cannot receive one",
        ),
        ("script: ' '", "line 1: `script` must not be blank"),
        ("script: \"a\\0\"", "line 1: `script` must not contain a NUL byte; programs cannot receive one"),
        ("call: a b", "line 1: `call` must have 1 to 128 characters of A-Z, a-z, 0-9, `.`, `_` and `-`"),
        ("call: job", "line 1: `call` must not be `job`, which is reserved for `run` and `script`"),
        ("call: program", "line 1: `call` must not be `program`, which is reserved for `run` and `script`"),
        // Keys without effect.
        ("call: x\nstdin: a", "line 2: `stdin` applies only to `run` and `script`"),
        ("call: x\nvars: {}", "line 2: `vars` applies only to `run` and `script`"),
        ("call: x\nneeds: {}", "line 2: `needs` applies only to `run` and `script`"),
        ("call: x\nok: {}", "line 2: `ok` applies only to `run` and `script`"),
        ("run: [x]\nwith: {}", "line 2: `with` applies only to `call`"),
    ]);
}

#[test]
fn a_problem_with_a_value_is_reported_with_line_and_remedy() {
    assert_complaints(&[
        ("run: [x]\nname: ''", "line 2: `name` must be one line of 1 to 128 bytes"),
        // A hint with the value would name another one: 3.1, and 7.
        ("run: [x]\nname: 3.10", "line 2: `name` must be text, not a number; put quotes around it"),
        ("run: [x]\nname: 007", "line 2: `name` must be text, not a number; put quotes around it"),
        ("run: [x]\nsession: ..", "line 2: `session` must be a valid folder name; \"..\" is not"),
        ("run: [x]\nsession: .", "line 2: `session` must be a valid folder name; \".\" is not"),
        (
            "run: [x]\nat: a\nnative: {outp: x}",
            "line 3: the key `native.outp` is not allowed in `native`: Baton sets or forbids `output`",
        ),
        (
            "run: [x]\nsession: a/b",
            "line 2: `session` must have 1 to 128 characters of A-Z, a-z, 0-9, `.`, `_` and `-`",
        ),
        ("run: [x]\nqueue: a.high", "line 2: `queue` must have 1 to 64 characters of a-z, 0-9, `_` and `-`"),
        ("run: [x]\nqueue: Big", "line 2: `queue` must have 1 to 64 characters of a-z, 0-9, `_` and `-`"),
        ("run: [x]\nhold: yes", "line 2: `hold` must be true or false, not text"),
        ("run: [x]\npriority: urgent", "line 2: `priority` must be high, normal, low, or an integer from -100 to 100"),
        ("run: [x]\npriority: 101", "line 2: `priority` must be high, normal, low, or an integer from -100 to 100"),
        ("run: [x]\nvars:\n  A: 1", "line 3: `vars.A` must be text, not a number; put quotes around it"),
        ("run: [x]\nvars:\n  A: true", "line 3: `vars.A` must be text, not a boolean; put quotes around it: \"true\""),
        ("run: [x]\nvars:\n  A:", "line 3: `vars.A` must be text, not null"),
        (
            "run: [x]\nvars: {A=B: x}",
            "line 2: the key `vars.A=B` is not a variable name; it must not be empty or contain `=` or a NUL byte",
        ),
        (
            "run: [x]\nvars: {'': x}",
            "line 2: the key `vars.` is not a variable name; it must not be empty or contain `=` or a NUL byte",
        ),
        ("run: [x]\nvars: {A: \"\\0\"}", "line 2: `vars.A` must not contain a NUL byte; programs cannot receive one"),
        ("run: [x]\nvars: [a]", "line 2: `vars` must be a map from text to text, not a list"),
        ("run: [x]\nlabels: {a: ''}", "line 2: `labels.a` must have 1 to 128 bytes, but has 0"),
        ("run: [x]\nlabels: {'': a}", "line 2: the key `labels.` must have 1 to 128 bytes, but has 0"),
        ("run: [x]\nlabels: {a: 2026}", "line 2: `labels.a` must be text, not a number; put quotes around it"),
        ("run: [x]\nok: {exit: []}", "line 2: `ok.exit` must be a list of one or more integers from 0 to 255"),
        ("run: [x]\nok: {exit: [256]}", "line 2: `ok.exit` must be a list of one or more integers from 0 to 255"),
        ("run: [x]\nok: {exit: [-1]}", "line 2: `ok.exit` must be a list of one or more integers from 0 to 255"),
        ("run: [x]\nok: {exit: 0}", "line 2: `ok.exit` must be a list of exit codes such as [0, 1], not a number"),
    ]);
    let long = "x".repeat(129);
    assert!(complaint(&format!("run: [x]\nlabels: {{a: {long}}}"), Format::Yaml).contains("but has 129"));
    assert!(complaint(&format!("run: [x]\nqueue: {long}"), Format::Yaml).contains("1 to 64"));
}

#[test]
fn a_problem_with_a_duration_or_with_retry_is_reported_with_line_and_remedy() {
    assert_complaints(&[
        ("run: [x]\nneeds: {time: 30}", "line 2: `needs.time` is invalid: `30` has no unit; write `30s` for seconds"),
        ("run: [x]\ntimeout: {total: 0s}", "line 2: `timeout.total` must be longer than 0s and at most ten years"),
        ("run: [x]\ntimeout: {queue: 3651d}", "line 2: `timeout.queue` must be longer than 0s and at most ten years"),
        (
            "run: [x]\nretry: {max: 0}",
            "line 2: `retry.max` must be an integer from 1 to 1000: the total number of tries",
        ),
        (
            "run: [x]\nretry: {max: -1}",
            "line 2: `retry.max` must be an integer from 1 to 1000: the total number of tries",
        ),
        (
            "run: [x]\nretry: {max: 1001}",
            "line 2: `retry.max` must be an integer from 1 to 1000: the total number of tries",
        ),
        (
            "run: [x]\nretry: {max: 1.5}",
            "line 2: `retry.max` must be an integer from 1 to 1000: the total number of tries",
        ),
        ("run: [x]\nretry: {wait: {factor: 0.5}}", "line 2: `retry.wait.factor` must be a number from 1 to 1000"),
        ("run: [x]\nretry: {wait: {jitter: 1.1}}", "line 2: `retry.wait.jitter` must be a number from 0 to 1"),
        ("run: [x]\nretry: {wait: {jitter: -0.1}}", "line 2: `retry.wait.jitter` must be a number from 0 to 1"),
        (
            "run: [x]\nretry: {wait: {first: 2m, max: 1m}}",
            "line 2: `retry.wait.first` (2m) is longer than `retry.wait.max` (1m)",
        ),
        ("run: [x]\nretry: {wait: 30}", "line 2: `retry.wait` is invalid: `30` has no unit; write `30s` for seconds"),
        (
            "run: [x]\nretry: {wait: [30]}",
            "line 2: `retry.wait` must be a map with the keys first, factor, max, jitter, not a list",
        ),
    ]);
    assert!(
        complaint("run: [x]\nneeds: {time: -5s}", Format::Yaml)
            .starts_with("line 2: `needs.time` is invalid: `-5s` is not")
    );
    assert!(
        complaint("run: [x]\nneeds: {time: -5}", Format::Yaml)
            .starts_with("line 2: `needs.time` is invalid: `-5` is not")
    );
}

#[test]
fn every_key_of_later_versions_is_rejected_by_name() {
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
    // No second problem about the missing `run` of a workflow.
    assert_eq!(complaint("steps: {a: {run: [x]}}", Format::Yaml), "line 1: `steps` is not supported by this version");
}

#[test]
fn all_problems_are_reported_at_once_in_every_format() {
    let expected = "line 2: `env` is not supported by this version\n\
                    line 3: unknown key `rnu`; did you mean `run`?\n\
                    line 5: `retry.max` must be an integer from 1 to 1000: the total number of tries\n\
                    line 6: `queue` must have 1 to 64 characters of a-z, 0-9, `_` and `-`";
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
        "`env` is not supported by this version\n`queue` must have 1 to 64 characters of a-z, 0-9, `_` and `-`"
    );
}

#[test]
fn a_syntax_error_is_reported_with_its_position() {
    let duplicate = |key: &str| format!("duplicate key `{key}`; remove one of them");
    let infinite = "infinity and NaN are not supported";
    for (text, format, position, expected) in [
        ("run: [x]\nname: a\nname: b", Format::Yaml, "line 3, column 1", duplicate("name").as_str()),
        ("run = ['x']\nname = 'a'\nname = 'b'", Format::Toml, "line 3, column 1", "duplicate key"),
        (
            "{\"run\": [\"x\"],\n \"name\": \"a\",\n \"name\": \"b\"}",
            Format::Json,
            "line 3, column 8",
            &duplicate("name"),
        ),
        ("call: x\nwith:\n  a: 1\n  a: 2", Format::Yaml, "line 4, column 3", &duplicate("a")),
        ("{\"call\": \"x\", \"with\": {\"a\": 1,\n\"a\": 2}}", Format::Json, "line 2, column 4", &duplicate("a")),
        (
            "run: [x]\n---\nrun: [y]\n",
            Format::Yaml,
            "line 3, column 1",
            "a second document starts here; put each process into a separate file",
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
            "merge keys (`<<`) are not supported; repeat the keys instead",
        ),
        ("run: !python/object [x]", Format::Yaml, "line 1, column 21", "unsupported tag `!python/object`"),
        ("call: x\nwith: .inf", Format::Yaml, "line 2, column 7", infinite),
        ("call = 'x'\nwith = inf", Format::Toml, "line 2", infinite),
        ("call = 'x'\nwith = 2026-01-01", Format::Toml, "line 2", "dates must be text; put quotes around it"),
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
        assert_eq!(error.to_string(), format!("{position}: {expected}"), "{text}");
        assert_eq!(error.problems().len(), 1, "{text}");
    }
}

#[test]
fn an_error_has_one_line_without_control_characters_whatever_the_document_contains() {
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
fn documents_that_expand_or_nest_too_much_are_rejected() {
    let mut bomb = "call: x\nwith:\n  a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for (name, before) in ["b", "c", "d", "e", "f", "g", "h", "i"].into_iter().zip("abcdefgh".chars()) {
        let aliases = vec![format!("*{before}"); 10].join(", ");
        bomb.push_str(&format!("  {name}: &{name} [{aliases}]\n"));
    }
    let found = complaint(&bomb, Format::Yaml);
    assert!(found.contains("limit of 1 MiB"), "{found}");

    let fat = format!("call: x\nwith:\n- &a {}\n{}", "x".repeat(100_000), "- *a\n".repeat(20));
    let found = complaint(&fat, Format::Yaml);
    assert!(found.contains("limit of 1 MiB"), "{found}");

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
    assert!(found.contains("argument 1 (line 1) has 131072 bytes") && found.contains("`stdin`"), "{found}");
    let found = complaint(&format!("run: [x]\nvars: {{A: {}}}", &long[2..]), Format::Yaml);
    assert!(found.contains("`vars.A` has 131072 bytes"), "{found}");
    assert!(yaml(&format!("run: [echo, {}]\nvars: {{A: {}}}", &long[1..], &long[3..])).is_ok());

    let large = format!("script: |\n  {}", "x".repeat(1024 * 1024));
    assert!(complaint(&large, Format::Yaml).contains("limit of 1 MiB"));
    let value = json!({"script": "x".repeat(1024 * 1024)});
    assert!(from_json_value(value).unwrap_err().to_string().contains("larger than 1 MiB"));
    assert!(yaml(&format!("script: |\n  {}", "x".repeat(1_000_000))).is_ok());
}
