//! The keys of programs on a site.

use super::*;
use crate::digest::Digest;
use crate::spec::on_site::{How, Input, Location, Needs, Output, Scope, When};

const FULL: &str = r#"
name: relax
run: [pw.x, -in, relax.in]
at: cluster
session: si
needs: {nodes: 2, ranks: 8, cpus: 4, mem: 32GiB, gpus: 0, time: 2h}
native: {account: s1234, exclusive: ""}
pre: [module load qe]
in:
  - client://relax.in
  - client:///deep/data/
  - client://old.in > new.in
  - {from: client://a.txt, to: "inputs/"}
  - {from: client://b.tgz, how: unpack}
  - {from: client://c.tgz, to: task://., how: unpack, optional: true}
  - {from: resource://pseudo/Si.upf, how: link}
  - {from: session://last.chk, to: resource://kept/, how: copy}
out:
  - relax.out
  - task://logs/
  - relax.out > session://outs/
  - {from: scratch/, to: session://relax, how: move, when: ok}
  - {from: "**/*.chk", to: resource://chk/, when: always, optional: true}
  - {from: core, to: store://, when: error}
values: task://result.json
"#;

fn at(scope: Scope, path: &str) -> Location {
    Location { scope, path: path.to_owned() }
}

fn incoming(from: Location, to: Location, how: How, optional: bool) -> Input {
    Input { from, to, how, optional }
}

fn outgoing(from: &str, to: Location, how: How, when: When, optional: bool) -> Output {
    Output { from: from.to_owned(), to, how, when, optional }
}

fn full_on_site() -> OnSite {
    use Scope::{Client, Resource, Session, Store, Task};
    OnSite {
        at: "cluster".into(),
        needs: Needs { nodes: Some(2), ranks: Some(8), cpus: Some(4), mem: Some(32 << 30), gpus: Some(0) },
        native: [("account".to_owned(), "s1234".to_owned()), ("exclusive".to_owned(), String::new())].into(),
        pre: vec!["module load qe".into()],
        inputs: vec![
            incoming(at(Client, "relax.in"), at(Task, "relax.in"), How::Auto, false),
            incoming(at(Client, "deep/data/"), at(Task, "data/"), How::Auto, false),
            incoming(at(Client, "old.in"), at(Task, "new.in"), How::Auto, false),
            incoming(at(Client, "a.txt"), at(Task, "inputs/a.txt"), How::Auto, false),
            incoming(at(Client, "b.tgz"), at(Task, ""), How::Unpack, false),
            incoming(at(Client, "c.tgz"), at(Task, ""), How::Unpack, true),
            incoming(at(Resource, "pseudo/Si.upf"), at(Task, "Si.upf"), How::Link, false),
            incoming(at(Session, "last.chk"), at(Resource, "kept/last.chk"), How::Copy, false),
        ],
        staged: None,
        staged_version: 1,
        outputs: vec![
            outgoing("relax.out", at(Store, ""), How::Auto, When::Ok, false),
            outgoing("logs/", at(Store, ""), How::Auto, When::Ok, false),
            outgoing("relax.out", at(Session, "outs/relax.out"), How::Auto, When::Ok, false),
            outgoing("scratch/", at(Session, "relax/"), How::Move, When::Ok, false),
            outgoing("**/*.chk", at(Resource, "chk/"), How::Auto, When::Always, true),
            outgoing("core", at(Store, ""), How::Auto, When::Error, false),
        ],
        values: Some("result.json".into()),
    }
}

#[test]
fn every_key_of_a_site_is_read() {
    let spec = yaml(FULL).unwrap();
    assert_eq!(spec.on_site, Some(full_on_site()));
    assert_eq!((spec.kind(), spec.effective_name(), spec.time), ("job", "relax", Some(Duration::from_secs(7200))));
    assert!(spec.on_site.is_some_and(|on_site| on_site.needs_client()));
    let bare = yaml("script: x\nat: farm").unwrap();
    assert_eq!(bare.on_site, Some(OnSite { at: "farm".into(), ..OnSite::default() }));
    for here in ["script: x\nat: here", "script: x", "call: x\nat: here"] {
        assert_eq!(yaml(here).unwrap().on_site, None, "{here}");
    }
}

#[test]
fn json_and_toml_are_equivalent_and_a_stored_spec_round_trips() {
    let json = json!({
        "run": ["x"], "at": "cluster", "in": ["client://a > b", {"from": "resource://c/", "to": "c"}],
        "out": [{"from": "*.out", "when": "always"}], "needs": {"mem": "500MB"}
    });
    let spec = parse(&json.to_string(), Format::Json).unwrap();
    let toml = "run = ['x']\nat = 'cluster'\nin = ['client://a > b', {from = 'resource://c/', to = 'c'}]\n\
                out = [{from = '*.out', when = 'always'}]\nneeds.mem = '500MB'";
    assert_eq!(parse(toml, Format::Toml).unwrap(), spec);
    assert_eq!(from_json_value(json).unwrap(), spec);

    let mut captured = yaml(FULL).unwrap();
    captured.on_site.as_mut().unwrap().staged = Some(Digest::of(b"manifest"));
    for spec in [spec, captured, yaml(FULL).unwrap()] {
        let bytes = rmp_serde::to_vec_named(&spec).unwrap();
        assert_eq!(rmp_serde::from_slice::<Spec>(&bytes).unwrap(), spec);
        let back: Spec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!((back.digest(), back), (spec.digest(), spec));
    }
}

#[test]
fn every_difference_of_a_site_changes_the_digest() {
    let lines = [
        "at: a",
        "at: b",
        "at: a\nneeds: {nodes: 1}",
        "at: a\nneeds: {ranks: 1}",
        "at: a\nneeds: {cpus: 1}",
        "at: a\nneeds: {mem: 1GB}",
        "at: a\nneeds: {mem: 1GiB}",
        "at: a\nneeds: {gpus: 1}",
        "at: a\nnative: {a: b}",
        "at: a\npre: [a]",
        "at: a\nin: [client://a]",
        "at: a\nin: [resource://a]",
        "at: a\nin: [client://a > b]",
        "at: a\nin: [{from: client://a, how: copy}]",
        "at: a\nin: [{from: client://a, optional: true}]",
        "at: a\nout: [a]",
        "at: a\nout: [{from: a, when: always}]",
        "at: a\nout: [{from: a, optional: true}]",
        "at: a\nout: [a > resource://a]",
        "at: a\nout: [{from: a, to: resource://a, how: move}]",
        "at: a\nvalues: a",
    ];
    let digests: std::collections::BTreeSet<_> = lines
        .iter()
        .map(|lines| yaml(&format!("run: [x]\n{lines}")).unwrap_or_else(|error| panic!("{lines}: {error}")).digest())
        .chain([yaml("run: [x]").unwrap().digest()])
        .collect();
    assert_eq!(digests.len(), lines.len() + 1);
}

#[test]
fn memory_has_a_unit() {
    for (text, bytes) in
        [("1KiB", 1024), ("500MB", 500_000_000), ("3 GiB", 3 << 30), ("1TiB", 1 << 40), ("2kB", 2000), ("2KB", 2000)]
    {
        let spec = yaml(&format!("run: [x]\nat: a\nneeds: {{mem: {text}}}")).unwrap();
        assert_eq!(spec.on_site.unwrap().needs.mem, Some(bytes), "{text}");
    }
}

#[test]
fn a_problem_with_a_site_is_reported_with_line_and_remedy() {
    let without = |key: &str| format!("`{key}` requires a site; name one in `at`, such as `at: cluster`");
    for key in ["in: [client://a]", "out: [a]", "values: a", "native: {a: b}", "pre: [a]"] {
        let name = key.split(':').next().unwrap();
        for at in ["", "\nat: here"] {
            let found = complaint(&format!("run: [x]\n{key}{at}"), Format::Yaml);
            assert_eq!(found, format!("line 2: {}", without(name)), "{key}");
        }
        let found = complaint(&format!("call: x\n{key}"), Format::Yaml);
        assert_eq!(found, format!("line 2: `{name}` applies only to `run` and `script`"), "{key}");
    }
    for key in ["nodes: 1", "ranks: 1", "cpus: 1", "mem: 1GiB", "gpus: 1"] {
        let name = key.split(':').next().unwrap();
        let found = complaint(&format!("run: [x]\nneeds: {{time: 1h, {key}}}"), Format::Yaml);
        assert_eq!(found, format!("line 2: {}", without(&format!("needs.{name}"))), "{key}");
    }
    let units = "KiB, MiB, GiB, TiB, kB, KB, MB, GB, TB";
    for (lines, expected) in [
        ("needs: {nodes: 0}", "`needs.nodes` must be an integer from 1 to 1000000".to_owned()),
        ("needs: {ranks: 1.5}", "`needs.ranks` must be an integer from 1 to 1000000".to_owned()),
        ("needs: {gpus: -1}", "`needs.gpus` must be an integer from 0 to 1000000".to_owned()),
        ("needs: {mem: 32}", format!("`needs.mem` is invalid: `32` has no unit; write `32GiB`, or use one of {units}")),
        (
            "needs: {mem: 1.5GiB}",
            format!("`needs.mem` is invalid: `1.5GiB` is not a size; write an integer with one of {units}"),
        ),
        (
            "needs: {mem: lots}",
            format!("`needs.mem` is invalid: `lots` is not a size; write an integer with one of {units}"),
        ),
        ("needs: {mem: 0MB}", "`needs.mem` must be more than 0 and at most 1 EiB".to_owned()),
        ("needs: {mem: 99999999999TB}", "`needs.mem` must be more than 0 and at most 1 EiB".to_owned()),
        (
            "native: {--account: a}",
            "the key `native.--account` must be the long name of an option without `--`, such as `account`".to_owned(),
        ),
        (
            "native: {job-name: a}",
            "the key `native.job-name` is not allowed in `native`: Baton sets or forbids `job-name`".to_owned(),
        ),
        (
            "native: {arr: a}",
            "the key `native.arr` is not allowed in `native`: Baton sets or forbids `array`".to_owned(),
        ),
        ("native: {account: \"a\\nb\"}", "`native.account` must be one line without control characters".to_owned()),
        ("native: {nodes: 2}", "`native.nodes` must be text, not a number; put quotes around it".to_owned()),
        ("pre: module load", "`pre` must be a list of shell lines such as [module load gcc], not text".to_owned()),
        ("pre: [a, \"b\\nc\"]", "`pre` line 1 must not contain a line break; split it".to_owned()),
        ("values: 'a/'", "`values` must be a file in task://, not `a/`".to_owned()),
        ("values: ../a", "`values` `../a` leads out of its folder with `..`".to_owned()),
        ("values: session://a", "`values` must be a file in task://, not `session://a`".to_owned()),
    ] {
        let found = complaint(&format!("run: [x]\nat: a\n{lines}"), Format::Yaml);
        assert_eq!(found, format!("line 3: {expected}"), "{lines}");
    }
    assert_eq!(
        complaint("run: [x]\nat: a/b", Format::Yaml),
        "line 2: `at` must be `here` or the name of a site, of 1 to 128 characters of A-Z, a-z, 0-9, `.`, `_` and `-`, not `a/b`"
    );
    assert_eq!(
        complaint("call: x\nat: a", Format::Yaml),
        "line 2: `at` with a site applies only to `run` and `script`; remove it"
    );
}

#[test]
fn a_problem_with_an_input_is_reported() {
    let digest = Digest::of(b"");
    let of_store = format!("store://{digest}");
    let of_store = of_store.as_str();
    let to_folder = format!("{{from: {of_store}, to: 'a/'}}");
    let scopes = "client://, task://, session://, resource://, store://";
    for (entry, expected) in [
        ("a.txt", "`a.txt` has no scope; write `client://a.txt` for a local file"),
        ("client://../a", "`client://../a` leads out of its folder with `..`"),
        ("client://a/../../b", "`client://a/../../b` leads out of its folder with `..`"),
        ("client:////etc/passwd", "`client:////etc/passwd` is absolute; make it relative to its scope"),
        ("client://a//b", "`client://a//b` has an empty component (`//` or a trailing `/`)"),
        ("\"client://a\\0b\"", "`client://a\u{fffd}b` contains a NUL byte"),
        ("client://", "`client://` names no file; add the path of a file, or of a directory with a trailing `/`"),
        ("client:///", "`client:///` names no file; add the path of a file, or of a directory with a trailing `/`"),
        ("task://a", "`task://a`: task:// is empty before the program starts"),
        ("store://abc", "`store://abc` must be store:// followed by a SHA-256 of 64 lower-case hexadecimal digits"),
        (&to_folder, "`to` is a directory; add a file name, since a digest is not a file name"),
        ("pilot://a", "`pilot://` is not supported by this version"),
        ("step://relax/a", "`step://` is not supported by this version"),
        ("http://example.org/a", &format!("unknown scope `http://`; the scopes are {scopes}")),
        ("client://a > b > c", "`client://a > b > c` has more than one ` > `; use a map with from, to and how"),
        ("client://a > /etc/a", "`/etc/a` is absolute; make it relative to its scope"),
        ("client://a > ../a", "`../a` leads out of its folder with `..`"),
        ("client://a > .baton/stdout", "`.baton/stdout`: `.baton` in task:// is reserved for Baton; use another name"),
        ("client://.baton/", "`client://.baton/`: `.baton` in task:// is reserved for Baton; use another name"),
        ("client://a > client://b", "`to` must not be client://; use task://, session:// or resource://"),
        ("client://a > store://", "`to` must not be store://; use task://, session:// or resource://"),
        ("{from: client://a, how: move}", "`how: move` requires a source in session:// or resource://; remove `how`"),
        (
            &format!("{{from: {of_store}, to: a, how: link}}"),
            "`how: link` requires a source in session:// or resource://; remove `how`",
        ),
        (
            "{from: resource://a/, to: 'task://', how: link}",
            "`how: link` cannot replace task:// itself; name a directory in `to`, or use copy",
        ),
        ("{from: client://a/, how: unpack}", "`client://a/` is a directory; `how: unpack` requires an archive"),
        ("client://a > session://a", "session:// requires the key `session`"),
    ] {
        let found = complaint(&format!("run: [x]\nat: a\nin:\n- {entry}"), Format::Yaml);
        assert_eq!(found, format!("line 4: entry 0 of `in`: {expected}"), "{entry}");
    }
    assert!(complaint(&format!("run: [x]\nat: a\nin:\n- {of_store}"), Format::Yaml).contains("requires `to`"));
    for (entries, expected) in [
        ("[client://x/a, client://a]", "entry 1 of `in`: another entry has the target `task://a`"),
        (
            "[client://a, client://b > a/b]",
            "entry 1 of `in`: the target `task://a/b` lies below `task://a`, the target of another entry",
        ),
        ("[{to: a}]", "entry 0 of `in` has no `from`"),
        ("[{from: client://a, how: template}]", "`in.how` `template` is not supported by this version"),
        ("[{from: client://a, how: cp}]", "`in.how` must be auto, copy, link, move or unpack, not `cp`"),
        ("[{from: client://a, when: ok}]", "unknown key `in.when`; did you mean `out.when`?"),
        ("[{from: client://a, optional: 1}]", "`in.optional` must be true or false, not a number"),
        ("[[a]]", "entry 0 of `in` must be text or a map with the keys from, to, how, optional, not a list"),
        ("client://a", "`in` must be a list of files such as [client://a.txt], not text"),
    ] {
        let found = complaint(&format!("run: [x]\nat: a\nin: {entries}"), Format::Yaml);
        assert_eq!(found, format!("line 3: {expected}"), "{entries}");
    }
    // Each entry has its own problem.
    let found = complaint("run: [x]\nat: a\nin:\n- a\n- client://ok\n- client://../b", Format::Yaml);
    assert_eq!(found.lines().count(), 2, "{found}");
}

#[test]
fn a_problem_with_an_output_is_reported() {
    for (entry, expected) in [
        ("client://a", "`client://a`: outputs must be in task://, the program's sandbox"),
        ("/etc/passwd", "`/etc/passwd` is absolute; make it relative to its scope"),
        ("../a", "`../a` leads out of its folder with `..`"),
        ("task://.baton/stdout", "`task://.baton/stdout`: `.baton` in task:// is reserved for Baton; use another name"),
        (".", "`.` names no file; add the path of a file, of a directory with a trailing `/`, or `**` for all files"),
        ("a > b", "`to` has no scope: `b`; write `session://b`, or remove `to`"),
        (
            "a > client://b",
            "`to` must not be client://: the client may be gone when the program ends; remove `to`, and fetch the output with `baton results PID --get DIR`",
        ),
        ("a > task://b", "`to` must not be task://; use store://, session:// or resource://"),
        ("a > store://b", "`to` must be store:// without a path, since the store names files by their content"),
        ("{from: a, how: move}", "`how` applies only to targets in session:// and resource://; remove it"),
        (
            "{from: a, to: resource://a, how: link}",
            "`how: link` would dangle once the sandbox is removed; use copy or move",
        ),
        ("{from: a, to: resource://a, how: unpack}", "`how: unpack` applies only to `in`; use copy or move"),
        ("'a[1'", "`a[1` is not a valid pattern: unclosed character class; missing ']'"),
        ("'*/'", "`*/`: a pattern matches files only; write `*/**`"),
        ("'*.out > resource://outs'", "`*.out` may match several files; add a trailing `/` to `to`"),
        ("a > session://b", "session:// requires the key `session`"),
    ] {
        let found = complaint(&format!("run: [x]\nat: a\nout:\n- {entry}"), Format::Yaml);
        assert_eq!(found, format!("line 4: entry 0 of `out`: {expected}"), "{entry}");
    }
    let found = complaint("run: [x]\nat: a\nout: [{from: a, when: later}]", Format::Yaml);
    assert_eq!(found, "line 3: `out.when` must be ok, error or always, not `later`");
}

#[test]
fn a_single_star_does_not_match_a_slash() {
    for (pattern, path, expected) in [
        ("*.chk", "a.chk", true),
        ("*.chk", "b/a.chk", false),
        ("**/*.chk", "b/a.chk", true),
        ("**/*.chk", "a.chk", true),
        ("a?.{x,y}", "a1.y", true),
        (r"a\[1]", "a[1]", true),
    ] {
        let glob = crate::spec::on_site::glob(pattern).unwrap().compile_matcher();
        assert_eq!(glob.is_match(path), expected, "{pattern} {path}");
    }
}
