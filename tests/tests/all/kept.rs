//! All outputs of a program are kept, or the missing ones are named; a fleet keeps them where all its members find
//! them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::scene::Scene;
use baton_tests::slurm::Slurm;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

async fn end(scene: &Scene, pid: &str) -> Value {
    let condition = format!("place = 3 AND id = '{pid}'");
    eventually("it has ended", LIMIT, async || {
        if scene.count(&condition).await == 1 { Ok(()) } else { Err(scene.show(pid).await) }
    })
    .await;
    scene.show(pid).await
}

/// A tree by the bytes of its paths: the content and executable bit of each file, nothing for a folder.
fn tree(folder: &Path) -> BTreeMap<Vec<u8>, Option<(Vec<u8>, bool)>> {
    fn walk(root: &Path, folder: &Path, found: &mut BTreeMap<Vec<u8>, Option<(Vec<u8>, bool)>>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
            if path.is_dir() {
                found.insert(name, None);
                walk(root, &path, found);
            } else {
                let mode = std::fs::metadata(&path).unwrap().permissions().mode();
                found.insert(name, Some((std::fs::read(&path).unwrap(), mode & 0o100 != 0)));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, folder, &mut found);
    found
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn every_file_and_folder_comes_through_by_its_bytes() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let folder = scene.path("tree");
    std::fs::create_dir_all(folder.join("empty/deep")).unwrap();
    std::fs::create_dir(folder.join(OsStr::from_bytes(b"folder \xfe"))).unwrap();
    let deep = format!("{}/leaf", vec!["d".repeat(200); 15].join("/"));
    let long = "n".repeat(255);
    let names: [&[u8]; 11] = [
        b"caf\xe9",
        b"two\nlines",
        b"-rf *",
        b"\\ \" ' $x `y`",
        b" blank ",
        b"[a]{b}?",
        b".hidden",
        b"folder \xfe/\xff",
        long.as_bytes(),
        b"x.part",
        deep.as_bytes(),
    ];
    for name in names {
        let path = folder.join(OsStr::from_bytes(name));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, name).unwrap();
    }
    // Large files take another path.
    let large = vec![7; 1_500_000];
    for name in [b"large \xfd\n".as_slice(), &[b'L'; 255]] {
        std::fs::write(folder.join(OsStr::from_bytes(name)), &large).unwrap();
    }
    std::fs::write(folder.join("none"), "").unwrap();
    for name in ["large.sh", "small.sh"] {
        let content = if name.starts_with("large") { &large[..] } else { b"#!/bin/sh\n" };
        std::fs::write(folder.join(name), content).unwrap();
        std::fs::set_permissions(folder.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let spec = "at: plain
session: one
script: |
  cp -Rp tree made
  ln -s tree linked
in:
  - client://tree/
  - client://tree/ > session://tree/
  - {from: client://tree/, to: copied/, how: copy}
out:
  - made/
  - linked/
  - copied/
  - {from: made/, to: session://made/}
";
    let pid = slurm.submit(&scene, spec, 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    assert_eq!((&shown["exit"], &shown["state"]), (&0.into(), &"finished".into()), "{shown:#}");
    slurm.baton(&scene, &["results", &pid, "--get", "results"]).await.ok();
    let expected = tree(&folder);
    for place in ["results/made", "results/linked", "results/copied", "site/s/one/tree", "site/s/one/made"] {
        let found = tree(&scene.path(place));
        let differs = expected.iter().find(|(path, content)| found.get(*path) != Some(content));
        let differs =
            differs.map(|(path, content)| (String::from_utf8_lossy(path), content.as_ref().map(|c| (c.0.len(), c.1))));
        assert!(differs.is_none() && found.len() == expected.len(), "{place}: {differs:?}");
    }
    let listed = slurm.baton(&scene, &["results", &pid, "-o", "json"]).await.ok().json();
    let latin = listed.as_array().unwrap().iter().find(|entry| entry["path_hex"] == "6d6164652f636166e9").unwrap();
    assert_eq!(latin["path"], "made/caf\\xe9");
    assert!(
        listed.as_array().unwrap().iter().any(|entry| entry["path"] == "made/empty/deep" && entry["folder"] == true)
    );
    // Existing files are not fetched again.
    let again = slurm.baton(&scene, &["results", &pid, "--get", "results", "-o", "json"]).await.ok().json();
    assert_eq!(again["fetched"], 0, "{again}");
}

/// The reason names each missing output. The others are kept, and a program that ended well does not run again.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_cannot_be_kept_is_named_and_costs_nothing_else() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let runs = scene.path("runs");
    let spec = |script: &str, rest: &str| {
        format!(
            "at: plain\nsession: one\nretry: {{max: 3, wait: 100ms}}\nscript: |\n  echo ran >> {}\n  {script}\n{rest}\n",
            runs.display()
        )
    };
    let strange = "mkdir d; echo a > d/a; mkfifo d/pipe; ln -s /etc/hostname d/out; ln -s nowhere d/dangles; \
                   ln -s .. d/up; ln -s ../.baton/stdout d/own; ln -s a d/fine; echo log > log; echo s > s";
    let python = "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('d/socket')\"";
    let outs = "out: [d/, missing, log, {from: log, to: 'session://', when: always}, gone/*.x]\nvalues: s";
    let pid = slurm.submit(&scene, &spec(&format!("{strange}; {python}"), outs), 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    let reason = shown["reason"].as_str().unwrap_or_default();
    for named in [
        "d/dangles is a link that leads nowhere",
        "d/out is a link that leads out of the sandbox",
        "d/own is a link to .baton, which belongs to Baton",
        "d/pipe is a pipe",
        "d/socket is a socket",
        "d/up is a link that leads back to a folder in which it is",
        "nothing in the sandbox matches `missing`",
        "nothing in the sandbox matches `gone/*.x`",
        "`values: s` is not a JSON object",
    ] {
        assert!(reason.contains(named), "{named} in {reason}");
    }
    assert!(reason.starts_with("output: ") && shown["state"] == "excepted" && shown["exit"] == 0, "{shown:#}");
    assert_eq!(std::fs::read_to_string(&runs).unwrap(), "ran\n", "it had ended well");
    let listed = slurm.baton(&scene, &["results", &pid, "-o", "json"]).await.ok().json();
    let paths: Vec<&str> = listed.as_array().unwrap().iter().filter_map(|entry| entry["path"].as_str()).collect();
    assert_eq!(paths, ["d/a", "d/fine", "log"]);
    assert_eq!(std::fs::read_to_string(scene.path("site/s/one/log")).unwrap(), "log\n");

    // Values that are not JSON; the other outputs are kept.
    for (written, told) in [
        ("{\"a\": 1,\\n\"b\": NaN}", "has `NaN` in line 2, which JSON does not have"),
        ("{\"a\": -Infinity}", "has `-Infinity` in line 1"),
        ("[1]", "is JSON, but not an object"),
    ] {
        let script = format!("printf '{written}' > v; echo kept > f");
        let pid = slurm.submit(&scene, &spec(&script, "out: [f]\nvalues: v"), 1).await.remove(0);
        let shown = end(&scene, &pid).await;
        let reason = shown["reason"].as_str().unwrap_or_default();
        assert!(reason.contains(told) && shown["state"] == "excepted" && shown["try"] == 1, "{shown:#}");
        slurm.baton(&scene, &["results", &pid]).await.ok();
    }

    // A failed program is retried; the reason names a missing output after the exit code.
    std::fs::remove_file(&runs).unwrap();
    let outs = "out: [{from: d/, when: always}, {from: f, when: error}, never]";
    let script = "mkdir d; mkfifo d/pipe; echo kept > f; exit 3";
    let pid = slurm.submit(&scene, &spec(script, outs), 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    assert_eq!((&shown["state"], &shown["reason"]), (&"finished".into(), &"exit 3; output: d/pipe is a pipe".into()));
    assert_eq!(std::fs::read_to_string(&runs).unwrap().lines().count(), 3);
    let listed = slurm.baton(&scene, &["results", &pid]).await.ok().stdout;
    assert!(listed.contains(" f "), "{listed}");
}

/// A folder that is not searched may hold the requested file. An input that Baton has linked into the sandbox is not an
/// output.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_a_folder_hides_is_named_and_a_linked_input_is_not() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    for folder in ["elsewhere", "site/r/pseudo"] {
        std::fs::create_dir_all(scene.path(folder)).unwrap();
        std::fs::write(scene.path(folder).join("a.dat"), "a").unwrap();
    }
    let spec = |link: &str, out: &str| {
        let script = format!("echo x > x.dat; mkdir d; {link}");
        format!("at: plain\nin: [resource://pseudo/]\nscript: '{script}'\nout: ['{out}']\n")
    };
    let link = format!("ln -s {} d/far", scene.path("elsewhere").display());
    for (link, out, reason) in [
        ("true", "**/*.dat", ""),
        ("true", "**", ""),
        (link.as_str(), "*.dat", ""),
        ("ln -s loop d/loop; ln -s a d/b; ln -s b d/a; ln -s $(printf %300d 0) d/long", "*.dat", ""),
        (&link, "**/*.dat", "output: what `**/*.dat` matches in d/far, which is a link that leads out of the sandbox"),
        ("true", "pseudo/", "output: pseudo is a link that leads out of the sandbox"),
    ] {
        let pid = slurm.submit(&scene, &spec(link, out), 1).await.remove(0);
        let shown = end(&scene, &pid).await;
        let state = if reason.is_empty() { "finished" } else { "excepted" };
        assert_eq!((shown["state"].as_str(), shown["reason"].as_str().unwrap_or_default()), (Some(state), reason));
        if out != "pseudo/" {
            let listed = slurm.baton(&scene, &["results", &pid]).await.ok().stdout;
            assert!(listed.contains(" x.dat "), "{listed}");
        }
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_program_that_empties_its_own_folder_has_its_own_end() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let runs = scene.path("runs");
    let mut pids = Vec::new();
    for remove in ["rm -rf ./* ./.[!.]*", "rm -rf \"$PWD\""] {
        let spec = format!(
            "at: plain\nretry: {{max: 2, wait: 100ms}}\nscript: |\n  echo ran >> {}\n  {remove}\nout: [x]\n",
            runs.display()
        );
        pids.push(slurm.submit(&scene, &spec, 1).await.remove(0));
    }
    for pid in pids {
        let condition = format!("place = 3 AND id = '{pid}'");
        eventually("it has ended", LIMIT * 4, async || {
            if scene.count(&condition).await == 1 { Ok(()) } else { Err(scene.show(&pid).await) }
        })
        .await;
        let shown = scene.show(&pid).await;
        let reason = shown["reason"].as_str().unwrap_or_default();
        // The job's script creates the folder again at the end, so a program that ended well is not run again.
        assert!(shown["state"] == "excepted" && shown["exit"] == 0, "{shown:#}");
        assert!(reason.starts_with("output: nothing in the sandbox matches `x`"), "{shown:#}");
        assert_eq!((&shown["try"], &shown["failures"]), (&1.into(), &0.into()), "{shown:#}");
    }
    assert_eq!(std::fs::read_to_string(&runs).unwrap().lines().count(), 2);
}

/// Each machine has its own default folder. A worker whose store differs from the client's leaves processes with files
/// to a worker that has the client's store.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_fleet_without_a_shared_object_store_says_so_and_fails_nothing() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    std::fs::write(scene.path("input"), "input\n").unwrap();
    let elsewhere = scene.path("elsewhere").display().to_string();
    let mut right = slurm.worker(&scene, "right", &[]).await;
    let _wrong = slurm.worker(&scene, "wrong", &[("BATON_OBJECTS_URL", &elsewhere)]).await;
    let bucket = [
        ("BATON_OBJECTS_URL", "s3://none"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ("AWS_ACCESS_KEY_ID", "none"),
        ("AWS_SECRET_ACCESS_KEY", "none"),
    ];
    let _cut_off = slurm.worker(&scene, "cut-off", &bucket).await;
    let text = "at: plain\nrun: [cat, input]\nin: [client://input]\n";
    let pids = slurm.submit(&scene, text, 10).await;
    for pid in &pids {
        let shown = end(&scene, pid).await;
        assert_eq!((&shown["exit"], &shown["try"], &shown["failures"]), (&0.into(), &1.into(), &0.into()), "{shown:#}");
    }
    let doctor = slurm.baton(&scene, &["doctor"]).await.exits(1);
    for worker in ["wrong", "cut-off"] {
        assert!(doctor.stdout.contains(&format!("worker {worker} does not run processes with files")), "{doctor:?}");
    }
    let workers = slurm.baton(&scene, &["workers"]).await.ok();
    assert!(workers.stdout.contains("wrong does not run processes with files"), "{workers:?}");
    assert!(workers.stdout.contains("BATON_OBJECTS_URL"), "{workers:?}");

    // A client with another store.
    let document = scene.spec("job.yaml", text).display().to_string();
    let (config, mine) = (scene.path("baton.toml").display().to_string(), scene.path("mine").display().to_string());
    let variables = [("BATON_CONFIG", config.as_str()), ("BATON_OBJECTS_URL", mine.as_str())];
    let refused = scene.baton_in(scene.folder(), &variables, &["submit", &document]).await.exits(4);
    assert!(refused.stderr.contains("is not the one that the fleet shares"), "{refused:?}");
    assert!(refused.stderr.contains("BATON_OBJECTS_URL") && !scene.path("mine").exists(), "{refused:?}");
    let doctor = scene.baton_in(scene.folder(), &variables, &["doctor"]).await.exits(4);
    assert!(doctor.stdout.contains("that the fleet shares"), "{doctor:?}");
    assert_eq!(scene.count("true").await, 10, "nothing more is submitted");

    // Only the wrong worker remains: the process waits, and resumes when a worker with the right store starts.
    right.terminate().await;
    let pid = slurm.submit(&scene, text, 1).await.remove(0);
    let told = eventually("the cause is explained", LIMIT, async || {
        let text = slurm.baton(&scene, &["explain", &pid]).await.ok().stdout;
        if text.contains("that the fleet shares") { Ok(text) } else { Err(text) }
    })
    .await;
    assert!(told.contains("BATON_OBJECTS_URL"), "{told}");
    let _right = slurm.worker(&scene, "right-again", &[]).await;
    assert_eq!(end(&scene, &pid).await["exit"], 0);
}
