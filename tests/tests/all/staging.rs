//! Files that are staged to a site before a job and back after it.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use baton_common::spec::Spec;
use baton_common::store::blob;
use baton_tests::eventually;
use baton_tests::proxy::{Fault, Proxy};
use baton_tests::scene::Scene;
use baton_tests::slurm::Slurm;

const LIMIT: Duration = Duration::from_secs(90);

async fn end(scene: &Scene, pid: &str) -> serde_json::Value {
    let condition = format!("place = 3 AND id = '{pid}'");
    eventually("it has ended", LIMIT, async || {
        if scene.count(&condition).await == 1 { Ok(()) } else { Err(scene.show(pid).await) }
    })
    .await;
    scene.show(pid).await
}

/// Bytes that compress badly and do not repeat.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

fn write(path: &Path, content: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn files_come_from_every_scope_and_go_to_every_scope() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    for idx in 0..40 {
        write(&scene.path(&format!("many/{idx}/it's {idx}")), format!("{idx}\n"));
    }
    let large = noise(3_000_000);
    write(&scene.path("large"), &large);
    write(&scene.path("tool"), "#!/bin/sh\necho tool\n");
    std::fs::set_permissions(scene.path("tool"), std::fs::Permissions::from_mode(0o755)).unwrap();
    write(&scene.path("packed/deep/inside"), "unpacked\n");
    let tar =
        Command::new("tar").args(["-czf", "archive.tgz", "-C", "packed", "."]).current_dir(scene.folder()).status();
    assert!(tar.unwrap().success());
    write(&scene.path("site/r/basis/Si"), "shared\n");
    symlink("Si", scene.path("site/r/basis/same")).unwrap();
    write(&scene.path("site/s/one/all/more/of/it"), "content\n");
    let spec = "at: cluster
session: one
script: |
  set -e
  cat many/*/* | wc -l; sha256sum < large; ./tool; cat box/deep/inside Si own
  [ -L Si ] && [ ! -L own ] && echo more >> own
  [ -L basis ] && [ -L some/basis ] && [ ! -L copied ] && cat basis/Si some/basis/Si copied/Si more/of/it
  [ ! -e basis/basis ] && [ ! -e copied/basis ] && [ $(readlink copied/same) = Si ] && echo more >> copied/Si
  mkdir -p out && cp large out/large && echo small > out/small && echo kept > keep
in:
  - client://many/
  - client://large
  - client://tool
  - {from: client://archive.tgz, to: box/, how: unpack}
  - {from: resource://basis/Si, how: link}
  - {from: resource://basis/Si, to: own, how: copy}
  - resource://basis/
  - resource://basis/ > some/basis/
  - {from: resource://basis/, to: copied, how: copy}
  - {from: session://all/, to: 'task://', how: copy}
  - {from: resource://nothing, optional: true}
out:
  - out/
  - {from: keep, to: session://kept/}
";
    let pid = slurm.submit(&scene, spec, 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    assert_eq!(shown["exit"], 0, "{shown:#}");
    let logs = slurm.baton(&scene, &["logs", &pid]).await.ok().stdout;
    let digest = baton_common::digest::Digest::of(&large);
    assert_eq!(logs, format!("40\n{digest}  -\ntool\nunpacked\nshared\nshared\nshared\nshared\nshared\ncontent\n"));
    slurm.baton(&scene, &["results", &pid, "--get", "results"]).await.ok();
    assert!(std::fs::read(scene.path("results/out/large")).unwrap() == large);
    assert_eq!(std::fs::read_to_string(scene.path("results/out/small")).unwrap(), "small\n");
    assert_eq!(std::fs::read_to_string(scene.path("site/s/one/kept/keep")).unwrap(), "kept\n");
    assert_eq!(
        std::fs::read_to_string(scene.path("site/r/basis/Si")).unwrap(),
        "shared\n",
        "a copy is the program's own"
    );
}

/// The first worker dies after stage-in, the second after stage-out, and the program fails once: each successor finds
/// what was moved before it.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_moved_or_copied_again_is_the_same() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    write(&scene.path("site/s/one/seed"), "seed\n");
    write(&scene.path("site/s/one/tree/leaf"), "leaf\n");
    let spec = "at: plain
session: one
script: |
  cat seed tree/leaf && [ ! -e tree/tree ] || exit 3
  mkdir -p out/a out/b && echo a > out/a/x && echo b > out/b/x && echo c > c.chk
  [ \"${PWD##*/}\" != 1 ]
in:
  - {from: session://seed, how: move}
  - {from: session://tree, how: copy}
out:
  - {from: out/, to: session://all, how: move}
  - {from: '*.chk', to: session://checkpoints/, how: move}
  - '*.chk'
retry: {max: 2, wait: 1s}
";
    let pid = slurm.submit(&scene, spec, 1).await.remove(0);
    for border in ["job-staged", "job-collected"] {
        let border_returns = format!("{border}=return");
        slurm.worker(&scene, border, &[("FAILPOINTS", &border_returns)]).await.ended(LIMIT).await;
    }
    let _worker = slurm.worker(&scene, "w", &[]).await;
    let shown = end(&scene, &pid).await;
    assert_eq!((&shown["exit"], &shown["try"]), (&0.into(), &2.into()), "{shown:#}");
    assert!(!scene.path("site/s/one/seed").exists(), "it was moved");
    let read = |path: &str| std::fs::read_to_string(scene.path(&format!("site/s/one/{path}"))).unwrap();
    assert_eq!(["all/a/x", "all/b/x", "checkpoints/c.chk", "tree/leaf"].map(read), ["a\n", "b\n", "c\n", "leaf\n"]);
    let left = Command::new("find").arg(scene.path("site/s")).args(["-name", ".baton-*"]).output().unwrap().stdout;
    assert!(left.is_empty(), "incomplete files: {}", String::from_utf8_lossy(&left));
    let results = slurm.baton(&scene, &["results", &pid]).await.ok().stdout;
    assert!(results.contains("c.chk"), "a moved file is a result as well: {results}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_input_that_many_share_is_sent_once_and_is_the_own_of_each() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _workers = [slurm.worker(&scene, "w1", &[]).await, slurm.worker(&scene, "w2", &[]).await];
    write(&scene.path("large"), noise(20_000_000));
    let sum = Command::new("sha256sum").arg(scene.path("large")).output().unwrap().stdout;
    let sum = String::from_utf8_lossy(&sum)[..64].to_owned();
    let spec = "at: plain\nscript: 'sha256sum large; echo own >> large'\nin: [client://large]\n";
    let cached = || -> Vec<PathBuf> {
        std::fs::read_dir(scene.path("site/cache")).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let mut pids = slurm.submit(&scene, spec, 20).await;
    for round in 0..2 {
        for pid in &pids {
            let shown = end(&scene, pid).await;
            assert_eq!(shown["exit"], 0, "{shown:#}");
            let said = slurm.baton(&scene, &["logs", pid]).await.ok().stdout;
            assert!(said.starts_with(&sum), "{round}: {said}");
        }
        assert_eq!(cached().len(), 1, "{:?}", cached());
        if round == 1 {
            break;
        }
        // A write to the cache reaches no process.
        let file = &cached()[0];
        std::fs::set_permissions(file, PermissionsExt::from_mode(0o644)).unwrap();
        let mut open = std::fs::OpenOptions::new().append(true).open(file).unwrap();
        std::io::Write::write_all(&mut open, b"of another").unwrap();
        pids = slurm.submit(&scene, spec, 2).await;
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_leads_out_of_its_scope_is_refused() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    write(&scene.path("secret"), "secret\n");
    std::fs::create_dir_all(scene.path("site/r")).unwrap();
    symlink(scene.path("secret"), scene.path("site/r/link")).unwrap();
    symlink(scene.folder(), scene.path("site/r/folder")).unwrap();
    std::fs::create_dir_all(scene.path("bad")).unwrap();
    symlink("../../../../../../secret", scene.path("bad/link")).unwrap();
    let tar = |arguments: &[&str]| {
        assert!(Command::new("tar").args(arguments).current_dir(scene.folder()).status().unwrap().success())
    };
    tar(&["-cf", "link.tar", "-C", "bad", "link"]);
    tar(&["-cPf", "above.tar", "-C", "bad", "../secret"]);
    // Names that a line-based reader would misread.
    std::fs::create_dir_all(scene.path("strange")).unwrap();
    symlink("/etc/hostname", scene.path("strange/blank ")).unwrap();
    tar(&["-cf", "blank.tar", "-C", "strange", "."]);
    std::fs::rename(scene.path("strange/blank "), scene.path("strange/two\nlines")).unwrap();
    tar(&["-cf", "lines.tar", "-C", "strange", "."]);
    write(&scene.path("site/r/tree/deep/leaf"), "leaf\n");
    symlink("../../../../secret", scene.path("site/r/tree/deep/out")).unwrap();
    std::fs::create_dir_all(scene.path("site/r/plain")).unwrap();
    write(&scene.path("site/r/plain/shared"), "shared\n");
    let inputs = [
        "{from: resource://link, how: copy}",
        "resource://folder/secret",
        "{from: client://link.tar, how: unpack}",
        "{from: client://above.tar, how: unpack}",
        "{from: client://blank.tar, how: unpack}",
        "{from: client://lines.tar, how: unpack}",
        "{from: resource://tree/, how: copy}",
        "{from: resource://tree, to: a, how: copy}",
        "{from: resource://plain/shared, to: 'resource://folder/new/one', how: copy}",
        "{from: resource://plain/, to: p}, {from: resource://tree/deep/leaf, to: p/new, how: copy}",
    ];
    for input in inputs {
        let spec = format!("at: plain\nscript: cat *\nin: [{{from: client://secret, to: mine}}, {input}]\n");
        let pid = slurm.submit(&scene, &spec, 1).await.remove(0);
        let shown = end(&scene, &pid).await;
        let reason = shown["reason"].as_str().unwrap_or_default();
        assert!(
            shown["state"] == "excepted" && reason.contains("stage") && reason.contains("out of it"),
            "{input}: {shown:#}"
        );
    }
    assert!(!scene.path("new").exists(), "a folder was created outside the scope");
    assert!(!scene.path("site/r/plain/new").exists(), "a file was written through a link");
    // A link that the program makes cannot capture files outside its scope.
    let spec = format!("at: plain\nscript: ln -s {} stolen\nout: [stolen]\n", scene.path("secret").display());
    let pid = slurm.submit(&scene, &spec, 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    assert!(shown["state"] == "excepted" && shown["results"].is_null(), "{shown:#}");
    let values = scene.path("values");
    write(&values, r#"{"secret": 1}"#);
    let spec = format!("at: plain\nscript: ln -s {} values\nvalues: values\n", values.display());
    let pid = slurm.submit(&scene, &spec, 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    let reason = shown["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("leads out of its scope") && !shown.to_string().contains("secret"), "{shown:#}");
}

/// Shared files in a sandbox are not modified: a file with the same name replaces them only in the sandbox. An archive
/// of another sandbox cannot fake the end of a program that has not run.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_takes_the_place_of_something_shared_leaves_that_as_it_is() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let large = noise(2_000_000);
    write(&scene.path("data/large"), &large);
    write(&scene.path("site/r/shared"), "shared\n");
    write(&scene.path("site/r/new/more"), "more\n");
    write(&scene.path("other/shared"), "other\n");
    let tar = |name: &str| {
        let status = Command::new("tar").args(["-cf", name, "-C", "other", "."]).current_dir(scene.folder()).status();
        assert!(status.unwrap().success());
    };
    tar("other.tar");
    let spec = "at: plain
script: cat shared data/more; echo mine >> data/more
in:
  - client://data/
  - {from: resource://shared, how: link}
  - {from: client://other.tar, how: unpack}
  - {from: resource://new/, to: data/, how: copy}
";
    let pid = slurm.submit(&scene, spec, 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    assert_eq!(shown["exit"], 0, "{shown:#}");
    assert_eq!(slurm.baton(&scene, &["logs", &pid]).await.ok().stdout, "other\nmore\n");
    let read = |path: &str| std::fs::read_to_string(scene.path(path)).unwrap();
    assert_eq!([read("site/r/shared"), read("site/r/new/more")], ["shared\n", "more\n"]);
    let cached = std::fs::read_dir(scene.path("site/cache")).unwrap().map(|entry| entry.unwrap());
    let modes: Vec<u32> = cached.map(|entry| entry.metadata().unwrap().permissions().mode() & 0o777).collect();
    assert_eq!(modes, [0o444; 2], "files in the cache are read-only");

    std::fs::create_dir_all(scene.path("other/.baton/started")).unwrap();
    write(&scene.path("other/.baton/done.json"), r#"{"exit":0,"phase":"program","started_at":1,"ended_at":2}"#);
    tar("sandbox.tar");
    write(&scene.path("site/r/sandbox/.baton/done.json"), "{}");
    let inputs = ["{from: client://sandbox.tar, how: unpack}", "{from: resource://sandbox/, to: 'task://', how: copy}"];
    for input in inputs {
        let spec = format!("at: plain\nrun: [echo, ran]\nin: [{input}]\n");
        let pid = slurm.submit(&scene, &spec, 1).await.remove(0);
        let shown = end(&scene, &pid).await;
        let reason = shown["reason"].as_str().unwrap_or_default();
        assert!(shown["state"] == "excepted" && reason.contains("belongs to Baton"), "{input}: {shown:#}");
    }
    // In its own subfolder, it belongs to the program.
    let spec =
        "at: plain\nrun: [cat, old/.baton/done.json]\nin: [{from: client://sandbox.tar, to: old/, how: unpack}]\n";
    let pid = slurm.submit(&scene, spec, 1).await.remove(0);
    assert_eq!(end(&scene, &pid).await["exit"], 0);
}

/// The connection is cut repeatedly after the same number of bytes: only a transfer that resumes completes.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_file_that_was_cut_goes_on_where_it_was() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "min_reconnect = '100ms'", "");
    let proxy = Proxy::start(&slurm.sshd.address()).await;
    slurm.configure(&scene, &proxy.address().to_string(), "", "min_reconnect = '100ms'");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let large = noise(40_000_000);
    write(&scene.path("large"), &large);
    proxy.set(Fault::CutAfter(24_000_000));
    // The output is another file, which no store has yet.
    let spec = "at: plain\nscript: 'echo said; { cat large; echo; } > back'\nin: [client://large]\nout: [back]\n";
    let pid = slurm.submit(&scene, spec, 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    assert_eq!(shown["exit"], 0, "{shown:#}");
    assert_eq!(shown["attempts"].as_array().unwrap().len(), 1, "a wait left an attempt: {shown:#}");
    assert_eq!(slurm.baton(&scene, &["logs", &pid]).await.ok().stdout, "said\n");
    slurm.baton(&scene, &["results", &pid, "--get", "results"]).await.ok();
    assert!(std::fs::read(scene.path("results/back")).unwrap() == [&large[..], b"\n"].concat());
    assert!(slurm.sshd.logged("Accepted publickey") > 2, "not both transfers were cut");
}

/// A connection stalls without ending, in each stage of a job's life.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_connection_that_stalls_costs_only_time() {
    let scene = Scene::new().await;
    let ssh = "min_reconnect = '100ms'\nkeepalive = '1s'";
    let slurm = Slurm::start(&scene, "", ssh, "");
    let proxy = Proxy::start(&slurm.sshd.address()).await;
    slurm.configure(&scene, &proxy.address().to_string(), "submit_timeout = '3s'\nsettle = '5s'", ssh);
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let large = noise(60_000_000);
    write(&scene.path("large"), &large);
    let spec = format!(
        "at: plain\nscript: 'echo ran >> {}; sleep 2; {{ cat large; echo; }} > back'\nin: [client://large]\nout: [back]\n",
        scene.path("runs").display()
    );
    // Being sent; being submitted; running; being fetched.
    let moments = [
        "SELECT count(*) FROM job",
        "SELECT 1 - count(*) FROM job WHERE external_id IS NULL",
        "SELECT 1 - count(*) FROM job WHERE external_id IS NOT NULL AND ended_at IS NULL",
        "SELECT 1 - count(*) FROM job WHERE ended_at IS NOT NULL",
    ];
    slurm.replace("timeout", "[ \"$1 $2\" != '-k 5' ] || sleep 1; exec $REAL \"$@\"");
    for (idx, moment) in moments.into_iter().enumerate() {
        scene.sql("DELETE FROM process; DELETE FROM job").await;
        let _ = std::fs::remove_dir_all(scene.path("site"));
        // The mark of the fleet's store stays.
        let _ = std::fs::remove_dir_all(scene.path("objects/sha256"));
        let _ = std::fs::remove_file(scene.path("runs"));
        let pid = slurm.submit(&scene, &spec, 1).await.remove(0);
        let part = scene.path("site/cache");
        eventually("the stage is reached", LIMIT, async || {
            let is_there = scene.sql(moment).await.trim() == "0";
            if is_there && (idx > 0 || part.exists()) { Ok(()) } else { Err(scene.sql("SELECT * FROM job").await) }
        })
        .await;
        proxy.set(Fault::Blackhole);
        tokio::time::sleep(Duration::from_secs(5)).await;
        proxy.set(Fault::Pass);
        let shown = end(&scene, &pid).await;
        assert_eq!((&shown["exit"], &shown["failures"]), (&0.into(), &0.into()), "{moment}: {shown:#}");
        assert_eq!(std::fs::read_to_string(scene.path("runs")).unwrap(), "ran\n", "{moment}");
        let _ = std::fs::remove_dir_all(scene.path("results"));
        slurm.baton(&scene, &["results", &pid, "--get", "results"]).await.ok();
        assert!(std::fs::read(scene.path("results/back")).unwrap() == [&large[..], b"\n"].concat(), "{moment}");
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_full_disk_at_the_site_is_waited_for_and_said_with_its_words() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    std::fs::create_dir_all(scene.path("site")).unwrap();
    let site = scene.path("site");
    let mount =
        |arguments: &[&str]| Command::new(arguments[0]).args(&arguments[1..]).arg(&site).status().unwrap().success();
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs"]) {
        // Only root can make a small disk; the project's test runs are as root.
        assert!(!rustix_is_root(), "tmpfs cannot be mounted");
        return;
    }
    let worker = slurm.worker(&scene, "w1", &[]).await;
    write(&scene.path("large"), noise(6_000_000));
    let pid = slurm.submit(&scene, "at: plain\nrun: ['true']\nin: [client://large]\n", 1).await.remove(0);
    let why = eventually("the process waits for room", LIMIT, async || {
        let explained = slurm.baton(&scene, &["explain", &pid, "-o", "json"]).await.json();
        let is_refused = explained[0]["condition"] == "refused_by_site";
        if is_refused { Ok(explained.to_string()) } else { Err(explained) }
    })
    .await;
    assert!(why.to_lowercase().contains("no space left on device"), "{why}");
    assert!(mount(&["mount", "-o", "remount,size=64m"]));
    let shown = end(&scene, &pid).await;
    drop(worker);
    assert!(mount(&["umount", "-l"]));
    assert_eq!((&shown["exit"], &shown["failures"]), (&0.into(), &0.into()), "{shown:#}");
}

/// A scope that leads outside is refused at stage-out, too; a full disk there pauses the process.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_scope_that_leads_out_is_refused_and_a_full_one_is_waited_for() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    std::fs::create_dir_all(scene.path("elsewhere")).unwrap();
    std::fs::create_dir_all(scene.path("site/s/one/full")).unwrap();
    symlink(scene.path("elsewhere"), scene.path("site/s/one/out")).unwrap();
    let spec = |to: &str| {
        let script = "head -c 3000000 /dev/zero > made";
        format!("at: plain\nsession: one\nscript: '{script}'\nout: [{{from: made, to: 'session://{to}/'}}]\n")
    };
    let pid = slurm.submit(&scene, &spec("out"), 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    let reason = shown["reason"].as_str().unwrap_or_default();
    assert!(shown["state"] == "excepted" && reason.contains("leads out of its scope"), "{shown:#}");
    assert!(!scene.path("elsewhere/made").exists());
    let full = scene.path("site/s/one/full");
    if !Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&full).status().unwrap().success() {
        assert!(!rustix_is_root(), "tmpfs cannot be mounted");
        return;
    }
    let pid = slurm.submit(&scene, &spec("full"), 1).await.remove(0);
    let reason = paused(&scene, &pid).await;
    assert!(Command::new("umount").arg("-l").arg(&full).status().unwrap().success());
    assert!(reason.contains("no space left on device"), "{reason}");
    slurm.baton(&scene, &["play", &pid]).await.ok();
    let shown = end(&scene, &pid).await;
    assert_eq!(shown["exit"], 0, "{shown:#}");
    assert_eq!(std::fs::metadata(full.join("made")).unwrap().len(), 3_000_000);
    let n_marks = std::fs::read_dir(scene.path("objects/owners")).unwrap().count();
    assert_eq!(n_marks, 1, "nobody else's `baton gc` removes results");
}

/// A file that is still being written is taken when it is complete, and does not pause the process.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_output_that_grows_is_taken_when_it_has_grown() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let grow = "for i in $(seq 40); do head -c 500000 /dev/urandom >> big; echo $i >> small; sleep 0.1; done";
    let script = format!("echo 0 > small; head -c 2000000 /dev/urandom > big; setsid sh -c \"{grow}\" &");
    let spec = format!("at: plain\nscript: |\n  {}\nout: [big, small]\n", script.replace('$', "\\$"));
    let pid = slurm.submit(&scene, &spec, 1).await.remove(0);
    let shown = end(&scene, &pid).await;
    assert_eq!((&shown["exit"], &shown["failures"]), (&0.into(), &0.into()), "{shown:#}");
    slurm.baton(&scene, &["results", &pid, "--get", "results"]).await.ok();
    assert_eq!(std::fs::metadata(scene.path("results/big")).unwrap().len(), 22_000_000);
    assert_eq!(std::fs::read_to_string(scene.path("results/small")).unwrap().lines().count(), 41);
}

async fn paused(scene: &Scene, pid: &str) -> String {
    let condition = format!("state = 3 AND place = 2 AND id = '{pid}'");
    eventually("it is paused", LIMIT, async || {
        if scene.count(&condition).await == 1 { Ok(()) } else { Err(scene.show(pid).await) }
    })
    .await;
    scene.show(pid).await["paused_reason"].as_str().unwrap_or_default().to_lowercase()
}

/// The outputs of a job are not thrown away when this machine has no room.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn results_without_room_pause_the_process_until_there_is_some() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let objects = scene.path("objects");
    std::fs::create_dir_all(&objects).unwrap();
    let mount = |options: &str| {
        let options = ["-t", "tmpfs", "-o", options, "tmpfs"];
        Command::new("mount").args(options).arg(&objects).status().unwrap().success()
    };
    if !mount("size=4m") {
        // Only root can make a small disk; the project's test runs are as root.
        assert!(!rustix_is_root(), "tmpfs cannot be mounted");
        return;
    }
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let large = noise(6_000_000);
    write(&scene.path("large"), &large);
    let runs = scene.path("runs");
    let spec = format!(
        "at: plain\nscript: 'echo ran >> {} && cp {} made'\nout: [made]\n",
        runs.display(),
        scene.path("large").display()
    );
    let pid = slurm.submit(&scene, &spec, 1).await.remove(0);
    let reason = paused(&scene, &pid).await;
    assert!(reason.starts_with("stage: ") && reason.contains("no space left on device"), "{reason}");
    assert!(mount("remount,size=64m"));
    slurm.baton(&scene, &["play", &pid]).await.ok();
    let shown = end(&scene, &pid).await;
    assert_eq!(shown["exit"], 0, "{shown:#}");
    assert_eq!(std::fs::read_to_string(runs).unwrap(), "ran\n");
    slurm.baton(&scene, &["results", &pid, "--get", "results"]).await.ok();
    assert!(std::fs::read(scene.path("results/made")).unwrap() == large);
    assert!(Command::new("umount").arg("-l").arg(&objects).status().unwrap().success());
}

fn rustix_is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// A changed host key is never accepted; waiting processes resume when the right key is back.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_host_that_shows_another_key_is_not_used() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "min_reconnect = '100ms'", "");
    let known = std::fs::read_to_string(slurm.sshd.file("known_hosts")).unwrap();
    let ours = std::fs::read_to_string(slurm.sshd.file("host_ed25519.pub")).unwrap();
    let other = std::fs::read_to_string(slurm.sshd.file("id_stranger.pub")).unwrap();
    let key = |text: &str| text.split_whitespace().nth(1).unwrap().to_owned();
    std::fs::write(slurm.sshd.file("known_hosts"), known.replace(&key(&ours), &key(&other))).unwrap();
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let pid = slurm.submit(&scene, "at: plain\nrun: ['true']\n", 1).await.remove(0);
    let told = eventually("the cause is explained", LIMIT, async || {
        let text = slurm.baton(&scene, &["explain", &pid]).await.ok().stdout;
        if text.contains("is unreachable") { Ok(text) } else { Err(text) }
    })
    .await;
    assert!(told.contains("host key"), "{told}");
    let doctor = slurm.baton(&scene, &["doctor"]).await.ok().stdout;
    assert!(doctor.contains("plain is unreachable") && doctor.contains("baton site test plain"), "{doctor}");
    assert_eq!(slurm.sshd.logged("Accepted publickey"), 0);
    std::fs::write(slurm.sshd.file("known_hosts"), known).unwrap();
    let shown = end(&scene, &pid).await;
    assert_eq!(shown["exit"], 0, "{shown:#}");
}

/// Changes a stored spec, as if a program with fewer checks had stored it.
async fn store_spec(scene: &Scene, pid: &str, change: impl FnOnce(&mut Spec)) {
    let body = scene.sql(&format!("SELECT encode(body, 'hex') FROM spec WHERE id = '{pid}'")).await;
    let bytes: Vec<u8> = body
        .trim()
        .as_bytes()
        .chunks(2)
        .map(|hex| u8::from_str_radix(str::from_utf8(hex).unwrap(), 16).unwrap())
        .collect();
    let mut spec = blob::spec_from_bytes(&bytes).unwrap();
    change(&mut spec);
    let hex: String = blob::spec_to_bytes(&spec).iter().map(|byte| format!("{byte:02x}")).collect();
    let sql = format!("UPDATE spec SET body = '\\x{hex}' WHERE id = '{pid}' RETURNING 1");
    assert_eq!(scene.sql(&sql).await.trim(), "1");
}

/// A process must not write how another has ended, nor read or move Baton's files of it.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn nothing_that_a_spec_names_reaches_what_is_batons() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    for session in ["..", "."] {
        let text = format!("at: plain\nsession: '{session}'\nrun: ['true']\n");
        let document = scene.spec("session.yaml", &text).display().to_string();
        let output = slurm.baton(&scene, &["submit", &document]).await.exits(2);
        assert!(output.stderr.contains("must be a valid folder name"), "{output:?}");
    }
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let victim = slurm.submit(&scene, "at: plain\nrun: ['true']\n", 1).await.remove(0);
    assert_eq!(end(&scene, &victim).await["exit"], 0);
    let forged = scene.path(&format!("site/p/{victim}/1/.baton/done.json"));
    let before = std::fs::read(&forged).unwrap();

    // Sessions and links that already exist.
    let held =
        "at: plain\nhold: true\nsession: one\nscript: echo mine > made\nout: [{from: made, to: 'session://TO'}]\n";
    let to = format!("p/{victim}/1/.baton/done.json");
    let stored = slurm.submit(&scene, &held.replace("TO", &to), 1).await.remove(0);
    store_spec(&scene, &stored, |spec| spec.session = Some("..".to_owned())).await;
    assert_eq!(scene.show(&stored).await["spec"]["session"], "..", "the stored spec can still be shown");
    slurm.baton(&scene, &["play", &stored]).await.ok();
    let sandbox = scene.path(&format!("site/p/{victim}/1"));
    std::fs::create_dir_all(scene.path("site/s")).unwrap();
    std::fs::create_dir_all(scene.path("site/r")).unwrap();
    for (name, target) in [("leads", sandbox.clone()), ("up", scene.path("site")), ("all", scene.path("site/p"))] {
        symlink(target, scene.path("site/s").join(name)).unwrap();
    }
    symlink(&sandbox, scene.path("site/r/leads")).unwrap();
    std::fs::create_dir_all(scene.path("linked")).unwrap();
    symlink(".baton", scene.path("linked/own")).unwrap();
    symlink(".", scene.path("linked/here")).unwrap();
    write(&scene.path("done.json"), r#"{"exit":0,"phase":"program","started_at":1,"ended_at":2}"#);
    let packed =
        Command::new("tar").args(["-cf", "linked.tar", "-C", "linked", "."]).current_dir(scene.folder()).status();
    assert!(packed.unwrap().success());
    let mut pids = vec![stored];
    let unpack = "{from: client://linked.tar, how: unpack}";
    for text in [
        "session: leads\nscript: echo mine > made\nout: [{from: made, to: 'session://.baton/done.json'}]".to_owned(),
        format!(
            "session: all\nscript: echo mine > made\nout: [{{from: made, to: 'session://{victim}/1/.baton/done.json'}}]"
        ),
        format!("session: up\nrun: ['true']\nin: [{{from: 'session://p/{victim}/1/.baton/done.json', how: copy}}]"),
        "run: ['true']\nin: [{from: 'resource://leads/.baton/done.json', how: move}]".to_owned(),
        format!("run: ['true']\nin: [{unpack}, {{from: client://done.json, to: own/done.json, how: copy}}]"),
        format!("run: ['true']\nin: [{unpack}, {{from: client://done.json, to: here/.baton/done.json, how: copy}}]"),
        format!("run: ['true']\nin: [{unpack}, {{from: client://linked.tar, to: own/x/, how: unpack}}]"),
        "script: ln -s .baton/done.json made\nout: [made]".to_owned(),
        "session: one\nscript: ln -s .baton made\nout: [{from: made/done.json, to: 'session://', how: move}]"
            .to_owned(),
        "script: ln -s .baton/done.json made\nvalues: made".to_owned(),
    ] {
        pids.push(slurm.submit(&scene, &format!("at: plain\n{text}\n"), 1).await.remove(0));
    }
    for pid in &pids {
        let shown = end(&scene, pid).await;
        let reason = shown["reason"].as_str().unwrap_or_default();
        assert!(shown["state"] == "excepted" && !reason.is_empty() && shown["values"]["exit"].is_null(), "{shown:#}");
        let is_told = ["out of its scope", "to Baton", "valid folder name", "nothing in the sandbox"];
        assert!(is_told.iter().any(|told| reason.contains(told)), "{reason}");
    }
    assert_eq!(std::fs::read(&forged).unwrap(), before);
}
