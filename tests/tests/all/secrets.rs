//! What programs can learn from their worker: no password, no open file, and nothing that another user owns.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::process::processes_with;
use baton_tests::scene::Scene;
use baton_tests::services::programs;

/// A script that starts a worker; `$PROGRAM` is a program that every user may execute.
fn wrapper(scene: &Scene, name: &str, commands: &str) -> String {
    let program = scene.path(&format!("{name}-worker"));
    fs::copy(programs().join("baton-worker"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(scene.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    let script = scene.path(&format!("{name}.sh"));
    fs::write(&script, format!("#!/bin/bash\nPROGRAM={}\n{commands}\n", program.display())).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    script.to_str().unwrap().to_owned()
}

/// Runs a script as a process, and returns its output.
async fn output_of(scene: &Scene, script: &str) -> String {
    let pid = scene.submit(&format!("{{script: {}}}", serde_json::to_string(script).unwrap()), 1).await.remove(0);
    scene.baton(&["watch", &pid, "--timeout", "60s"]).await.ok();
    scene.baton(&["logs", &pid]).await.ok().stdout
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn no_program_reads_the_passwords_of_its_worker_even_as_the_same_user() {
    let scene = Scene::new().await;
    let start = "chown -R 60112 root home tmp
        exec setpriv --reuid 60112 --regid 60112 --clear-groups $PROGRAM --database-url \"$BATON_DATABASE_URL\" \"$@\"";
    let wrapper = wrapper(&scene, "same", start);
    let worker = scene.worker_of(&wrapper, "same", &[]).await;
    let of_worker = format!("/proc/{}", worker.os_pid());
    let spy = format!(
        "id -u; for file in environ mem maps; do head -c 10 {of_worker}/$file && echo \"read $file\"; done
        ls {of_worker}/fd && echo read fd; tr '\\0' ' ' < {of_worker}/cmdline; exit 0"
    );
    let seen = output_of(&scene, &spy).await;
    assert!(seen.starts_with("60112\n") && seen.contains("--database-url (hidden)"), "{seen}");
    assert!(!seen.contains("read "), "{seen}");
    // Root may read the environment, but it contains no secret.
    let url = scene.database_url();
    for file in ["environ", "cmdline"] {
        let text = String::from_utf8_lossy(&fs::read(format!("{of_worker}/{file}")).unwrap()).into_owned();
        assert!(!text.contains(&url) && !text.contains("amqp://"), "{file}: {text}");
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_a_worker_has_inherited_reaches_no_program() {
    let scene = Scene::new().await;
    let wrapper = wrapper(&scene, "heir", "exec 5</etc/hostname 77</etc/hostname\nexec $PROGRAM \"$@\"");
    let worker = scene.worker_of(&wrapper, "heir", &[]).await;
    let seen = output_of(&scene, "ls /proc/$$/fd | tr '\\n' ' '").await;
    // The shell reads its script from descriptor 10.
    assert!(seen.split_whitespace().all(|number| number.len() == 1 && number != "5" || number == "10"), "{seen}");
    let open = fs::read_dir(format!("/proc/{}/fd", worker.os_pid())).unwrap().flatten();
    let targets: Vec<PathBuf> = open.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    // The worker closes none of its inherited files: one may hold a lock.
    assert!(targets.contains(&PathBuf::from("/etc/hostname")), "{targets:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn programs_run_as_the_user_that_the_worker_is_told_and_reach_nothing_of_root() {
    let scene = Scene::new().await;
    let wrapper = wrapper(&scene, "root", "exec $PROGRAM \"$@\"");
    for folder in ["worker-root", "worker-root/root"] {
        fs::create_dir_all(scene.path(folder)).unwrap();
        fs::set_permissions(scene.path(folder), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let _worker = scene.worker_of(&wrapper, "root", &["--user", "nobody"]).await;
    let seen = output_of(&scene, "id -un; id -G; echo $USER $HOME; touch made; stat -c %U . made .baton/script").await;
    let groups =
        String::from_utf8(std::process::Command::new("id").args(["-G", "nobody"]).output().unwrap().stdout).unwrap();
    assert!(seen.starts_with(&format!("nobody\n{groups}nobody /nonexistent\n")), "{seen}");
    assert!(seen.ends_with("nobody\nnobody\nnobody\n"), "{seen}");

    // Neither the shim nor the worker follows the links that the program has put in place of Baton's files.
    let secret = scene.path("secret");
    fs::write(&secret, "of root").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let link = format!("ln -sf {0} .baton/done.part; ln -sf {0} .baton/stdout; exit 0", secret.display());
    assert_eq!(output_of(&scene, &link).await, "");
    assert_eq!(fs::read_to_string(&secret).unwrap(), "of root");

    let pid = scene.submit("run: [sleep, '1000.5']", 1).await.remove(0);
    eventually("it runs", Duration::from_secs(30), async || {
        let running = processes_with("sleep 1000.5");
        let uids: Vec<u32> =
            running.iter().filter_map(|pid| Some(fs::metadata(format!("/proc/{pid}")).ok()?.uid())).collect();
        if uids.contains(&65_534) { Ok(()) } else { Err(uids) }
    })
    .await;
    scene.baton(&["kill", "--wait", &pid]).await.ok();
}

/// Root in a container may not read the environment of another user's processes.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_a_killed_shim_leaves_is_ended_as_its_user_and_costs_a_try() {
    let scene = Scene::new().await;
    let wrapper =
        wrapper(&scene, "root", "exec setpriv --bounding-set -sys_ptrace --inh-caps -sys_ptrace $PROGRAM \"$@\"");
    for folder in ["worker-root", "worker-root/root"] {
        fs::create_dir_all(scene.path(folder)).unwrap();
        fs::set_permissions(scene.path(folder), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let _worker = scene.worker_of(&wrapper, "root", &["--user", "nobody"]).await;
    let text = "setsid sleep 1000.6 & setsid sleep 1000.6 & kill -9 $PPID; sleep 1000.6";
    let spec = format!("script: '{text}'\nretry: {{max: 2, wait: 100ms}}\n");
    let pid = scene.submit(&spec, 1).await.remove(0);
    eventually("it has ended", Duration::from_secs(60), async || {
        let shown = scene.show(&pid).await;
        if shown["state"] == "excepted" { Ok(()) } else { Err(shown) }
    })
    .await;
    let shown = scene.show(&pid).await;
    assert_eq!((&shown["try"], &shown["failures"]), (&2.into(), &1.into()), "{shown:#}");
    assert!(shown["reason"].as_str().unwrap().contains("shim has vanished while it ran"), "{shown:#}");
    assert!(processes_with("sleep 1000.6").is_empty());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_that_may_not_run_programs_as_another_user_says_so_and_ends() {
    let scene = Scene::new().await;
    let start = "chown -R 60113 root home tmp\nexec setpriv --reuid 60113 --regid 60113 --clear-groups $PROGRAM \"$@\"";
    for (name, commands, user, says) in [
        ("other", start, "nobody", "only if the worker runs as root, and it runs as uid 60113"),
        ("nosuch", "exec $PROGRAM \"$@\"", "nosuch", "there is no user `nosuch`"),
        ("closed", "chmod 700 root\nexec $PROGRAM \"$@\"", "nobody", "could not enter"),
    ] {
        let script = wrapper(&scene, name, commands);
        let mut worker = scene.start_of(&script, name, &["--user", user]);
        worker.says(says).await;
        assert_eq!(worker.ended(Duration::from_secs(20)).await.code(), Some(2), "{name}");
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_baton_run_keeps_is_its_users_alone() {
    let scene = Scene::new().await;
    let spec = scene.spec("hello.yaml", "run: [echo, hello]").display().to_string();
    // A folder that an earlier version has created.
    let home = scene.path(".baton");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("baton.db"), "").unwrap();
    fs::set_permissions(home.join("baton.db"), fs::Permissions::from_mode(0o644)).unwrap();
    scene.baton(&["run", &spec]).await.ok();
    assert_eq!(fs::metadata(&home).unwrap().mode() & 0o777, 0o700);
    let files: Vec<_> = fs::read_dir(&home).unwrap().flatten().collect();
    let of_database = files.iter().filter(|file| file.file_name().to_string_lossy().starts_with("baton.db"));
    for file in of_database {
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600, "{file:?}");
    }
}
