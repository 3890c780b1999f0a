//! Commands and files on a site's machine, through a real OpenSSH server and on this machine.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use baton_common::digest::Digest;
use baton_tests::eventually;
use baton_tests::proxy::{Fault, Proxy};
use baton_tests::sshd::Sshd;
use baton_worker::transport::{Error, Output, Session, connect, quote};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::PollSender;

const LIMIT: Duration = Duration::from_secs(20);

/// A limit that is meant to be exceeded.
const SHORT: Duration = Duration::from_millis(200);

/// The server, and a session of each kind; both must behave the same.
async fn both() -> (Sshd, [Session; 2]) {
    let sshd = Sshd::start();
    let session = connect(&sshd.section()).await.unwrap();
    (sshd, [session, Session::local()])
}

fn nothing(_: u64) {}

/// Bytes without repetition.
fn content(len: u32) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

async fn is_gone(pid_file: PathBuf) {
    eventually("the command is gone", LIMIT, async || {
        let pid = std::fs::read_to_string(&pid_file).map_err(|error| error.to_string())?;
        if Path::new("/proc").join(pid.trim()).exists() { Err(pid) } else { Ok(()) }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_command_gets_its_input_and_gives_back_its_outputs_and_its_end() {
    let (_sshd, sessions) = both().await;
    for session in sessions {
        let output = session.exec("cat; echo wrong >&2; exit 7", b"some\0bytes", LIMIT).await.unwrap();
        assert_eq!((output.exit, output.signal.as_deref()), (Some(7), None));
        assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"some\0bytes"[..], &b"wrong\n"[..]));
        assert_eq!(output.ok().unwrap_err().to_string(), "the command ended with exit code 7: wrong",);
        let output = session.exec("kill -TERM $$", b"", LIMIT).await.unwrap();
        assert_eq!((output.exit, output.signal.as_deref()), (None, Some("TERM")));
        // The command does not read its input.
        let output = session.exec("echo done", &content(5_000_000), LIMIT).await.unwrap();
        assert_eq!(output.ok().unwrap(), b"done\n");
        let home = session.exec("pwd -P", b"", LIMIT).await.unwrap().ok().unwrap();
        let own = std::env::home_dir().unwrap().canonicalize().unwrap();
        assert_eq!(String::from_utf8(home).unwrap().trim(), text(&own));
        let error = session.exec("head -c 17000000 /dev/zero", b"", LIMIT).await.unwrap_err();
        assert!(matches!(error, Error::TooMuchOutput), "{error}");
    }
}

/// The output of a command, and the bytes of its standard output.
async fn received(session: &Session, command: &str) -> (Output, Vec<u8>) {
    let (pieces_tx, mut pieces) = mpsc::channel(1);
    let receiving = session.receive(command, PollSender::new(pieces_tx));
    let collecting = async {
        let mut all = Vec::new();
        while let Some(piece) = pieces.recv().await {
            all.extend_from_slice(&piece);
        }
        all
    };
    let (output, all) = tokio::join!(receiving, collecting);
    (output.unwrap(), all)
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_stream_goes_in_and_comes_out() {
    let (sshd, sessions) = both().await;
    let content = content(5_000_000);
    for session in sessions {
        let there = sshd.file("stream");
        let output = session.send(&format!("cat > {}; exit 3", quote(text(&there))), content.as_slice()).await.unwrap();
        assert_eq!(output.exit, Some(3));
        assert!(std::fs::read(&there).unwrap() == content);
        let (output, back) = received(&session, &format!("cat {}; echo end >&2", quote(text(&there)))).await;
        assert_eq!((output.exit, output.stdout.len(), output.stderr.as_slice()), (Some(0), 0, &b"end\n"[..]));
        assert!(back == content);
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_command_that_outlives_its_limit_is_gone_and_so_is_one_that_nobody_waits_for() {
    let (sshd, sessions) = both().await;
    for (i, session) in sessions.iter().enumerate() {
        let pid_file = sshd.file(&format!("limited-{i}"));
        let command = format!("echo $$ > {}; sleep 100; echo late", quote(text(&pid_file)));
        let error = session.exec(&command, b"", Duration::from_secs(1)).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }) && error.is_of_transport(), "{error}");
        is_gone(pid_file).await;
        let pid_file = sshd.file(&format!("dropped-{i}"));
        let command = format!("echo $$ > {}; sleep 100; echo late", quote(text(&pid_file)));
        timeout(Duration::from_secs(1), session.exec(&command, b"", Duration::from_secs(2))).await.unwrap_err();
        is_gone(pid_file).await;
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn commands_that_end_by_their_limit_use_up_no_channels() {
    let sshd = Sshd::with("MaxSessions 2");
    let session = connect(&sshd.section()).await.unwrap();
    let mut refusals = 0;
    for i in 0..20 {
        let error = session.exec("sleep 30", b"", SHORT).await.unwrap_err();
        // A signal from here does not end root's commands; they end a second or two later.
        let is_refused = matches!(error, Error::NoChannel(_)) && i >= 2;
        assert!(is_refused || matches!(error, Error::TimedOut { .. }), "{error}");
        refusals += u32::from(is_refused);
    }
    assert!(refusals < 20);
    eventually("a channel is free", LIMIT, async || session.exec("true", b"", LIMIT).await.map(drop)).await;
    assert!(!session.is_broken());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_future_that_is_dropped_at_any_time_leaves_no_channel_open() {
    let sshd = Sshd::with("MaxSessions 2");
    let session = connect(&sshd.section()).await.unwrap();
    let file = sshd.file("source");
    std::fs::write(&file, content(3_000_000)).unwrap();
    for i in 0..60_u64 {
        let limit = Duration::from_micros(i * 300);
        let _ = timeout(limit, session.exec("sleep 1", b"", LIMIT)).await;
        let _ = timeout(limit, session.put(&file, &format!("{}-{i}", text(&file)), &nothing)).await;
        let _ = timeout(limit, session.shell()).await;
    }
    for _ in 0..2 {
        eventually("a channel is free", LIMIT, async || session.exec("true", b"", LIMIT).await.map(drop)).await;
    }
    let held = session.shell().await;
    eventually("the other channel is free", LIMIT, async || session.exec("true", b"", LIMIT).await.map(drop)).await;
    drop(held);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_channel_too_many_is_an_error_of_its_own() {
    let sshd = Sshd::with("MaxSessions 1");
    let session = connect(&sshd.section()).await.unwrap();
    let mut shell = session.shell().await.unwrap();
    shell.run("true", LIMIT).await.unwrap();
    let error = session.exec("true", b"", LIMIT).await.unwrap_err();
    assert!(matches!(error, Error::NoChannel(_)) && error.is_of_transport(), "{error}");
    shell.run("true", LIMIT).await.unwrap();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_the_login_shell_prints_is_no_output() {
    let sshd = Sshd::with(r#"ForceCommand echo "welcome 100%" && echo beware >&2 && eval "$SSH_ORIGINAL_COMMAND""#);
    let session = connect(&sshd.section()).await.unwrap();
    let output = session.exec("printf data", b"", LIMIT).await.unwrap();
    assert_eq!(output.stdout, b"data");
    let (output, back) = received(&session, "printf data").await;
    output.ok().unwrap();
    assert_eq!(back, b"data");
    let mut shell = session.shell().await.unwrap();
    let output = shell.run("printf data; printf error >&2", LIMIT).await.unwrap();
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"data"[..], &b"error"[..]));

    let sshd = Sshd::with("ForceCommand echo nobody may log in && exit 1");
    let session = connect(&sshd.section()).await.unwrap();
    let error = session.exec("true", b"", LIMIT).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains("nobody may log in"), "{error}");
}

/// Text after a command, and another exit code, do not change its output, its exit or a digest.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_a_login_prints_after_a_command_is_no_output() {
    let folder = tempfile::tempdir().unwrap();
    let login = folder.path().join("login");
    let text = "#!/bin/sh\necho welcome; echo beware >&2\n/bin/sh -c \"$SSH_ORIGINAL_COMMAND\"\n\
                echo farewell; echo see you >&2\nexit 9\n";
    std::fs::write(&login, text).unwrap();
    std::fs::set_permissions(&login, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let sshd = Sshd::with(&format!("ForceCommand {}", login.display()));
    let session = connect(&sshd.section()).await.unwrap();
    for (command, exit) in [("printf data; printf error >&2", 0), ("printf data; printf error >&2; exit 3", 3)] {
        let output = session.exec(command, b"", LIMIT).await.unwrap();
        let said = (output.exit, output.stdout.as_slice(), output.stderr.as_slice());
        assert_eq!(said, (Some(exit), &b"data"[..], &b"error"[..]), "{command}");
        let (output, back) = received(&session, command).await;
        assert_eq!((output.exit, output.stderr.as_slice(), back.as_slice()), (Some(exit), &b"error"[..], &b"data"[..]));
    }
    let source = sshd.file("source");
    std::fs::write(&source, content(3_000_001)).unwrap();
    let (there, back) = (sshd.file("there").display().to_string(), sshd.file("back"));
    let expected = Digest::of(&content(3_000_001));
    assert_eq!(session.put(&source, &there, &|_| ()).await.unwrap(), expected);
    assert_eq!(session.digest(&there).await.unwrap(), expected);
    assert_eq!(session.size(&there).await.unwrap(), 3_000_001);
    assert_eq!(session.get(&there, &back, &|_| ()).await.unwrap(), expected);
    let (digest, came) =
        session.get_unless(&there, 3_000_001, &back, &|_| (), async |_| Ok::<_, Error>(false)).await.unwrap();
    assert_eq!((digest, came), (expected, Some(expected)));
    let mut shell = session.shell().await.unwrap();
    let output = shell.run("printf data; exit 4", LIMIT).await.unwrap();
    assert_eq!((output.exit, output.stdout.as_slice()), (Some(4), &b"data"[..]));
}

/// The server counts a channel until it is closed, even after its owner has given it up.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn one_channel_is_enough_for_one_thing_after_the_other() {
    let sshd = Sshd::with("MaxSessions 1");
    let session = connect(&sshd.section()).await.unwrap();
    for _ in 0..15 {
        let mut shell = session.shell().await.unwrap();
        shell.run("true", LIMIT).await.unwrap();
        drop(shell);
        session.exec("true", b"", LIMIT).await.unwrap().ok().unwrap();
        let given_up = session.exec("sleep 60", b"", Duration::from_millis(20)).await;
        assert!(matches!(given_up, Err(Error::TimedOut { .. } | Error::NoChannel(_))), "{given_up:?}");
        session.exec("true", b"", LIMIT).await.unwrap().ok().unwrap();
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_file_goes_there_and_back() {
    let (sshd, sessions) = both().await;
    std::fs::create_dir(sshd.file("odd")).unwrap();
    for (i, name) in ["it's there\n", "-rf", "a $(b) `c` \\ \"d\" *", "ünïcode", "empty"].iter().enumerate() {
        let content = if *name == "empty" { Vec::new() } else { content(3_000_001 + u32::try_from(i).unwrap()) };
        let source = sshd.file(name);
        std::fs::write(&source, &content).unwrap();
        for session in &sessions {
            let there = sshd.file("odd").join(name);
            // An existing file is replaced.
            std::fs::write(&there, "old").unwrap();
            let put = session.put(&source, text(&there), &nothing).await.unwrap();
            assert_eq!(put, Digest::of(&content), "{name}");
            assert!(std::fs::read(&there).unwrap() == content, "{name}");
            let back = sshd.file("back").with_extension(name);
            let told = Mutex::new(Vec::new());
            let got = session.get(text(&there), &back, &|bytes| told.lock().unwrap().push(bytes)).await.unwrap();
            assert_eq!(got, put, "{name}");
            assert!(std::fs::read(&back).unwrap() == content, "{name}");
            let told = told.into_inner().unwrap();
            assert!(told.is_sorted() && told.last() == Some(&(content.len() as u64)), "{told:?}");
            std::fs::remove_file(&back).unwrap();
        }
    }
    let left: Vec<_> = std::fs::read_dir(sshd.file("odd")).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left.len(), 5, "no part is left: {left:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_file_that_cannot_be_is_an_error_that_names_it() {
    let (sshd, sessions) = both().await;
    let source = sshd.file("id_rsa.pub");
    for session in sessions {
        for (result, name) in [
            (session.put(&source, text(&sshd.file("no/such/folder")), &nothing).await, "no/such/folder.part"),
            (session.put(&sshd.file("missing"), text(&sshd.file("there")), &nothing).await, "missing"),
            (session.get(text(&sshd.file("missing")), &sshd.file("here"), &nothing).await, "missing"),
            (session.get(text(&source), &sshd.file("no/such/folder"), &nothing).await, "no/such/folder.part"),
        ] {
            let error = result.unwrap_err();
            assert!(matches!(&error, Error::File { path, .. } if path.ends_with(name)), "{name}: {error}");
            // The system's message, or that of the remote shell.
            let said = error.to_string().to_lowercase();
            assert!(said.contains("no such file") || said.contains("nonexistent"), "{error}");
            assert!(!error.is_of_transport());
        }
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_part_that_is_longer_than_the_file_is_begun_anew() {
    let (sshd, sessions) = both().await;
    let source = sshd.file("source");
    std::fs::write(&source, content(1_000_000)).unwrap();
    for session in sessions {
        for (i, put) in [true, false].into_iter().enumerate() {
            let target = sshd.file(&format!("target-{i}"));
            std::fs::write(sshd.file(&format!("target-{i}.part")), vec![1; 1_000_001]).unwrap();
            if put {
                session.put(&source, text(&target), &nothing).await.unwrap();
            } else {
                session.get(text(&source), &target, &nothing).await.unwrap();
            }
            assert!(std::fs::read(&target).unwrap() == content(1_000_000));
        }
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_digest_is_that_of_the_file_there_and_not_of_what_was_sent() {
    let (sshd, sessions) = both().await;
    let source = sshd.file("source");
    // Large enough to be hashed while it grows.
    let content = content(20_000_000);
    std::fs::write(&source, &content).unwrap();
    for (i, session) in sessions.into_iter().enumerate() {
        let target = sshd.file(&format!("target-{i}"));
        // The beginning of another file.
        std::fs::write(sshd.file(&format!("target-{i}.part")), vec![1; 2_000_000]).unwrap();
        let digest = session.put(&source, text(&target), &nothing).await.unwrap();
        assert_ne!(digest, Digest::of(&content));
        assert_eq!(digest, Digest::of(&std::fs::read(&target).unwrap()));
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_digest_takes_no_more_than_the_plainest_tools() {
    // Large enough to be hashed while it grows, if a suitable Python exists.
    let content = content(20_000_000);
    let python = |script: &str| format!("#!/bin/sh\n{script}\n");
    // Simulates an old Python that lacks a function.
    let old = "program=\"import os\ndel os.pread\n$4\"; shift 4; exec /usr/bin/python3 -I -S -c \"$program\" \"$@\"";
    let wrapped = r#"/usr/bin/python3 "$@"; exit"#;
    let with_sha256sum = [None, Some("printf hello"), Some("exit 1"), Some("kill -KILL $$"), Some(old), Some(wrapped)]
        .map(|script| ("sha256sum", script.map(python)));
    for (hashes, python) in with_sha256sum.into_iter().chain([("python3", None)]) {
        let tools = tempfile::tempdir().unwrap();
        for tool in ["cat", "dd", "mv", "sh", "wc", hashes] {
            std::os::unix::fs::symlink(format!("/usr/bin/{tool}"), tools.path().join(tool)).unwrap();
        }
        if let Some(python) = &python {
            let path = tools.path().join("python3");
            std::fs::write(&path, python).unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!(r#"ForceCommand PATH={} && eval "$SSH_ORIGINAL_COMMAND""#, text(tools.path()));
        let sshd = Sshd::with(&path);
        let session = connect(&sshd.section()).await.unwrap();
        let (source, there) = (sshd.file("source"), sshd.file("there"));
        std::fs::write(&source, &content).unwrap();
        for n_there in [0, 7_000_000] {
            std::fs::write(sshd.file("there.part"), &content[..n_there]).unwrap();
            let put = session.put(&source, text(&there), &nothing).await.unwrap();
            assert_eq!(put, Digest::of(&content), "{hashes} {python:?}");
            let back = sshd.file("back");
            std::fs::write(sshd.file("back.part"), &content[..n_there]).unwrap();
            let got = session.get_unless(text(&there), content.len() as u64, &back, &nothing, unknown).await.unwrap();
            assert_eq!(got, (put, Some(put)), "{hashes} {python:?}");
            assert!(std::fs::read(&back).unwrap() == content, "{hashes} {python:?}");
        }
    }
}

async fn unknown(_: Digest) -> Result<bool, Error> {
    Ok(false)
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_known_already_does_not_come() {
    let (sshd, sessions) = both().await;
    let (source, here) = (sshd.file("source"), sshd.file("here"));
    // One length ends at the boundary of a single write.
    for len in [1_000, 4 << 20, 20_000_000] {
        std::fs::write(&source, content(len)).unwrap();
        for session in &sessions {
            let digest = Digest::of(&content(len));
            let known = async |asked| Ok::<_, Error>(asked == digest);
            let size = len as u64;
            assert_eq!(session.get_unless(text(&source), size, &here, &nothing, known).await.unwrap(), (digest, None));
            let got = session.get_unless(text(&source), size, &here, &nothing, unknown).await.unwrap();
            assert_eq!(got, (digest, Some(digest)));
        }
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_file_that_changes_while_it_comes_has_another_digest_here_than_there() {
    let (sshd, sessions) = both().await;
    let (source, here) = (sshd.file("source"), sshd.file("here"));
    for session in sessions {
        // A part of another file.
        std::fs::write(&source, content(20_000_000)).unwrap();
        std::fs::write(sshd.file("here.part"), vec![1; 2_000_000]).unwrap();
        let got = session.get_unless(text(&source), 20_000_000, &here, &nothing, unknown).await.unwrap();
        let came = Digest::of(&std::fs::read(&here).unwrap());
        assert_eq!(got, (Digest::of(&content(20_000_000)), Some(came)));
        assert_ne!(got.0, came);

        // It grows after its length was requested and before anything has arrived.
        let grow = |bytes| {
            if bytes == 0 {
                let mut file = std::fs::OpenOptions::new().append(true).open(&source).unwrap();
                file.write_all(b"more").unwrap();
            }
        };
        for len in [1_000, 20_000_000] {
            std::fs::write(&source, content(len)).unwrap();
            let (there, came) = session.get_unless(text(&source), len as u64, &here, &grow, unknown).await.unwrap();
            assert_ne!(Some(there), came);
            // It has become shorter.
            std::fs::write(&source, content(len - 10)).unwrap();
            session.get_unless(text(&source), len as u64, &here, &nothing, unknown).await.unwrap();
            assert_eq!(std::fs::read(&here).unwrap(), content(len - 10));
        }
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_part_that_another_makes_meanwhile_holds_nobody_up() {
    let tools = tempfile::tempdir().unwrap();
    // Simulates another transfer that starts on the same file right after this one was renamed.
    let mv = tools.path().join("mv");
    std::fs::write(&mv, "#!/bin/sh\n/usr/bin/mv \"$@\" && echo other > \"$2\"\n").unwrap();
    std::fs::set_permissions(&mv, Permissions::from_mode(0o755)).unwrap();
    let sshd =
        Sshd::with(&format!(r#"ForceCommand PATH={}:/usr/bin && eval "$SSH_ORIGINAL_COMMAND""#, text(tools.path())));
    let session = connect(&sshd.section()).await.unwrap();
    let (source, there) = (sshd.file("source"), sshd.file("there"));
    std::fs::write(&source, content(20_000_000)).unwrap();
    let put = timeout(LIMIT, session.put(&source, text(&there), &nothing)).await.unwrap().unwrap();
    assert_eq!(put, Digest::of(&content(20_000_000)));
    assert_eq!(std::fs::read(sshd.file("there.part")).unwrap(), b"other\n");
}

/// The command lines that name a path.
fn processes_about(path: &Path) -> Vec<String> {
    let command_lines = std::fs::read_dir("/proc").unwrap().flatten();
    let command_lines = command_lines.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    let command_lines = command_lines.map(|line| String::from_utf8_lossy(&line).into_owned());
    command_lines.filter(|line| line.contains(text(path))).collect()
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_file_goes_on_where_it_was_cut() {
    let sshd = Sshd::start();
    let proxy = Proxy::start(&sshd.address()).await;
    let section = sshd.section_by("127.0.0.1", proxy.address().port());
    let source = sshd.file("source");
    let content = content(40_000_000);
    std::fs::write(&source, &content).unwrap();
    for put in [true, false] {
        let (target, part) = (sshd.file("target"), sshd.file("target.part"));
        let copy = async |session: &Session, progress: &(dyn Fn(u64) + Send + Sync)| {
            if put {
                session.put(&source, text(&target), progress).await
            } else {
                session.get(text(&source), &target, progress).await
            }
        };
        let session = connect(&section).await.unwrap();
        proxy.set(Fault::CutAfter(25_000_000));
        let error = copy(&session, &nothing).await.unwrap_err();
        assert!(matches!(error, Error::Broken(_)) && error.is_of_transport(), "{error}");
        assert!(session.is_broken() && !target.exists());
        proxy.set(Fault::Pass);
        eventually("nothing of it is still running", LIMIT, async || {
            let left = processes_about(&part);
            if left.is_empty() { Ok(()) } else { Err(left) }
        })
        .await;
        let cut_at = std::fs::metadata(&part).unwrap().len();
        assert!((1_000_000..40_000_000).contains(&cut_at), "{cut_at}");

        let session = connect(&section).await.unwrap();
        let first = Mutex::new(None);
        let copied = copy(&session, &|bytes| _ = first.lock().unwrap().get_or_insert(bytes)).await.unwrap();
        assert_eq!(copied, Digest::of(&content));
        // The server may have continued for a while with the data that it had received.
        let first = first.into_inner().unwrap().unwrap();
        assert!((cut_at..40_000_000).contains(&first), "{first}");
        assert!(std::fs::read(&target).unwrap() == content && !part.exists());
        std::fs::remove_file(&target).unwrap();
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_silent_connection_is_broken_soon() {
    let sshd = Sshd::start();
    let proxy = Proxy::start(&sshd.address()).await;
    let mut section = sshd.section_by("127.0.0.1", proxy.address().port());
    section.keepalive = Duration::from_secs(1);
    let session = connect(&section).await.unwrap();
    session.ping(LIMIT).await.unwrap();
    let source = sshd.file("source");
    std::fs::write(&source, content(50_000_000)).unwrap();
    proxy.set(Fault::Blackhole);
    let error = session.ping(SHORT).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    let started = Instant::now();
    let there = sshd.file("there");
    let (put, exec) = tokio::join!(session.put(&source, text(&there), &nothing), session.exec("true", b"", LIMIT));
    for error in [put.unwrap_err(), exec.unwrap_err()] {
        assert!(matches!(error, Error::Broken(_)), "{error}");
    }
    assert!(started.elapsed() < Duration::from_secs(10) && session.is_broken());
    assert!(matches!(session.ping(LIMIT).await, Err(Error::Broken(_))));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_killed_server_breaks_what_runs_and_the_next_session_is_as_good() {
    let sshd = Sshd::start();
    let session = connect(&sshd.section()).await.unwrap();
    let mut shell = session.shell().await.unwrap();
    let running = async {
        let (exec, script) = tokio::join!(session.exec("echo x; sleep 30", b"", LIMIT), shell.run("sleep 30", LIMIT));
        (exec.unwrap_err(), script.unwrap_err())
    };
    let kill = async {
        eventually("both run", LIMIT, async || match sshd.logged("Starting session") {
            2 => Ok(()),
            other => Err(other),
        })
        .await;
        sshd.kill();
    };
    let ((exec, script), ()) = tokio::join!(running, kill);
    for error in [exec, script, shell.run("true", LIMIT).await.unwrap_err()] {
        assert!(matches!(error, Error::Broken(_)) && error.is_of_transport(), "{error}");
    }
    assert!(session.is_broken());
    let error = connect(&sshd.section()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }) && error.is_of_transport(), "{error}");
    sshd.start_again("");
    let session = connect(&sshd.section()).await.unwrap();
    session.exec("true", b"", LIMIT).await.unwrap().ok().unwrap();
    session.close().await;
    eventually("it is closed", LIMIT, async || if session.is_broken() { Ok(()) } else { Err("open") }).await;
    assert!(matches!(session.exec("true", b"", LIMIT).await, Err(Error::Broken(_))));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_shell_runs_many_scripts_on_one_channel() {
    let (sshd, sessions) = both().await;
    for session in sessions {
        let mut shell = session.shell().await.unwrap();
        for i in 0..100 {
            let script = format!("x=$(echo {i}); echo \"it's $x\"; echo e$x >&2; cat; exit {}", i % 3);
            let output = shell.run(&script, LIMIT).await.unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("it's {i}\n"));
            assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("e{i}\n"));
            assert_eq!(output.exit, Some(i % 3));
        }
        let output = shell.run("if", LIMIT).await.unwrap();
        assert!(output.exit != Some(0) && !output.stderr.is_empty());
        let long = format!("printf %s {} | wc -c", "x".repeat(3_000_000));
        assert_eq!(shell.run(&long, LIMIT).await.unwrap().ok().unwrap(), b"3000000\n");
        let output = shell.run("head -c 10000000 /dev/zero", LIMIT).await.unwrap();
        assert_eq!(output.stdout.len(), 10_000_000);
    }
    assert_eq!(sshd.logged("Starting session"), 1);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_shell_that_is_out_of_step_is_broken() {
    let (_sshd, sessions) = both().await;
    for session in sessions {
        let mut shell = session.shell().await.unwrap();
        let error = shell.run("sleep 3; echo late", SHORT).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        assert!(matches!(shell.run("true", LIMIT).await, Err(Error::Broken(_))));

        let mut shell = session.shell().await.unwrap();
        assert!(timeout(SHORT, shell.run("sleep 3; echo late", LIMIT)).await.is_err());
        assert!(matches!(shell.run("true", LIMIT).await, Err(Error::Broken(_))));

        let mut shell = session.shell().await.unwrap();
        let error = shell.run("kill -KILL $$", LIMIT).await.unwrap_err();
        assert!(matches!(error, Error::Broken(_)), "{error}");
        assert!(!session.is_broken());
        session.exec("true", b"", LIMIT).await.unwrap().ok().unwrap();
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_full_disk_there_is_an_error_about_the_file() {
    let (sshd, sessions) = both().await;
    let disk = sshd.small_disk();
    let source = sshd.file("source");
    let lens = [3_000_000, 20_000_000];
    for (session, len) in sessions.iter().flat_map(|session| lens.map(|len| (session, len))) {
        std::fs::write(&source, content(len)).unwrap();
        let there = disk.join("there");
        let error = session.put(&source, text(&there), &nothing).await.unwrap_err();
        assert!(matches!(&error, Error::File { path, .. } if path.ends_with("there.part")), "{error}");
        assert!(error.to_string().to_lowercase().contains("no space left") && !error.is_of_transport(), "{error}");
        let back = session.get(text(&source), &disk.join("back"), &nothing).await.unwrap_err();
        assert!(back.to_string().to_lowercase().contains("no space left"), "{back}");
        for name in ["there.part", "back.part"] {
            std::fs::remove_file(disk.join(name)).unwrap();
        }
        session.exec("true", b"", LIMIT).await.unwrap().ok().unwrap();
    }
}
