//! Commands and files on the worker's own machine, with the same semantics as by SSH.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use baton_common::digest::Digest;
use bytes::BytesMut;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout};

use super::Error;
use super::running::Item;
use crate::machine::open_files;

/// The worker's variables that a command inherits. The others may hold passwords, and some schedulers pass the whole
/// environment of the submitting command to the job.
const INHERITED: [&str; 10] =
    ["PATH", "HOME", "LANG", "TZ", "USER", "LOGNAME", "SHELL", "TMPDIR", "LD_LIBRARY_PATH", "SLURM_CONF"];

/// Longest file name of most file systems.
const NAME_BYTES_MAX: usize = 255;

/// Bytes read at a time from outputs and files.
const PIECE: usize = 64 << 10;

/// Bytes of a file copied at a time.
const COPY_PIECE: usize = 1 << 20;

/// A command in its own process group.
#[derive(Debug)]
pub(super) struct Command {
    input: Input,
    outputs: Outputs,
}

#[derive(Debug)]
pub(super) struct Input(Option<ChildStdin>);

#[derive(Debug)]
pub(super) struct Outputs {
    child: Child,
    /// `None` once the command is reaped; until then the system cannot reuse its id.
    group: Option<Pid>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
}

impl Command {
    pub(super) fn start(command: &str) -> Result<Self, Error> {
        let mut child = shell(command).spawn().map_err(|error| Error::file("/bin/sh", error))?;
        let group = group_of(&child);
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        Ok(Self { input: Input(stdin), outputs: Outputs { child, group, stdout, stderr } })
    }

    pub(super) fn halves(&mut self) -> (&mut Input, &mut Outputs) {
        (&mut self.input, &mut self.outputs)
    }
}

/// The shell for a command, in its own process group and with pipes.
pub(super) fn shell(command: &str) -> tokio::process::Command {
    let inherited = INHERITED.iter().filter_map(|name| std::env::var_os(name).map(|value| (name, value)));
    let mut shell = tokio::process::Command::new("/bin/sh");
    let text = match open_files::of_children() {
        Some(limit) => format!("ulimit -S -n {limit}; {command}"),
        None => command.to_owned(),
    };
    shell.arg("-c").arg(text).env_clear().envs(inherited).process_group(0);
    shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(home) = std::env::home_dir().filter(|home| home.is_dir()) {
        shell.current_dir(home);
    }
    shell
}

/// The process group of a command that [`shell`] started.
pub(super) fn group_of(child: &Child) -> Option<Pid> {
    child.id().and_then(|id| Pid::from_raw(id.cast_signed()))
}

impl Drop for Outputs {
    fn drop(&mut self) {
        if let Some(group) = self.group {
            // The group may be gone already.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Input {
    pub(super) async fn write(&mut self, piece: &[u8]) -> Result<(), Error> {
        let Some(stdin) = &mut self.0 else { return Ok(()) };
        match stdin.write_all(piece).await {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                self.end();
                Ok(())
            }
            Err(error) => Err(Error::Broken(error.to_string())),
        }
    }

    pub(super) fn end(&mut self) {
        self.0 = None;
    }
}

impl Outputs {
    pub(super) async fn next(&mut self) -> Result<Item, Error> {
        loop {
            let (mut out, mut err) = (BytesMut::with_capacity(PIECE), BytesMut::with_capacity(PIECE));
            tokio::select! {
                count = read(&mut self.stdout, &mut out), if self.stdout.is_some() => match count {
                    Ok(0) => self.stdout = None,
                    Ok(_) => return Ok(Item::Stdout(out.freeze())),
                    Err(error) => return Err(Error::Broken(error.to_string())),
                },
                count = read(&mut self.stderr, &mut err), if self.stderr.is_some() => match count {
                    Ok(0) => self.stderr = None,
                    Ok(_) => return Ok(Item::Stderr(err.freeze())),
                    Err(error) => return Err(Error::Broken(error.to_string())),
                },
                else => break,
            }
        }
        let status = self.child.wait().await.map_err(|error| Error::Broken(error.to_string()))?;
        self.group = None;
        Ok(Item::Ended { exit: status.code(), signal: signal_of(&status) })
    }
}

async fn read(
    pipe: &mut Option<impl tokio::io::AsyncRead + Unpin>,
    buffer: &mut BytesMut,
) -> Result<usize, std::io::Error> {
    match pipe {
        Some(pipe) => pipe.read_buf(buffer).await,
        None => Ok(0),
    }
}

/// The signal that ended a program, without `SIG`.
pub(super) fn signal_of(status: &std::process::ExitStatus) -> Option<String> {
    std::os::unix::process::ExitStatusExt::signal(status).map(signal_name)
}

/// The name of a signal in SSH, without `SIG`.
fn signal_name(number: i32) -> String {
    let known = [
        (Signal::ABORT, "ABRT"),
        (Signal::ALARM, "ALRM"),
        (Signal::FPE, "FPE"),
        (Signal::HUP, "HUP"),
        (Signal::ILL, "ILL"),
        (Signal::INT, "INT"),
        (Signal::KILL, "KILL"),
        (Signal::PIPE, "PIPE"),
        (Signal::QUIT, "QUIT"),
        (Signal::SEGV, "SEGV"),
        (Signal::TERM, "TERM"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
    ];
    let name = known.iter().find(|(signal, _)| signal.as_raw() == number);
    name.map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned())
}

/// Resolves a relative path from the home folder.
pub(super) fn at_home(path: &str) -> PathBuf {
    match std::env::home_dir() {
        Some(home) => home.join(path),
        None => PathBuf::from(path),
    }
}

/// Copies one file by way of [`part_of`], and returns the SHA-256 of the copy.
pub(super) async fn copy(from: &Path, to: &Path, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<Digest, Error> {
    let part = part_of(to);
    let of_source = |error: std::io::Error| Error::local_file(from, &error);
    let of_part = |error: std::io::Error| Error::local_file(&part, &error);
    let mut source = File::open(from).await.map_err(of_source)?;
    let size = source.metadata().await.map_err(of_source)?.len();
    let (mut target, mut done) = open_part(&part, size).await?;
    source.seek(std::io::SeekFrom::Start(done)).await.map_err(of_source)?;
    progress(done);
    let mut piece = Vec::with_capacity(COPY_PIECE);
    loop {
        piece.clear();
        let count = (&mut source).take(COPY_PIECE as u64).read_to_end(&mut piece).await.map_err(of_source)?;
        if count == 0 {
            break;
        }
        target.write_all(&piece).await.map_err(of_part)?;
        done += count as u64;
        progress(done);
    }
    target.flush().await.map_err(of_part)?;
    drop(target);
    let of_target = |error: std::io::Error| Error::local_file(to, &error);
    tokio::fs::rename(&part, to).await.map_err(of_target)?;
    let path = to.to_owned();
    let digest = tokio::task::spawn_blocking(move || Digest::of_file(&path)).await;
    let digest = digest.map_err(std::io::Error::other).and_then(|digest| digest);
    digest.map(|(digest, _)| digest).map_err(of_target)
}

/// The name of a file until it is complete.
pub(super) fn part_of(to: &Path) -> PathBuf {
    beside(to, ".part")
}

/// A name in the same folder: the name of the file with an ending, or a digest if that would be too long.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    if name.len() + ending.len() <= NAME_BYTES_MAX {
        let mut beside = path.as_os_str().to_owned();
        beside.push(ending);
        return PathBuf::from(beside);
    }
    path.with_file_name(format!(".baton-{}{ending}", &Digest::of(name).to_string()[..16]))
}

/// Opens a file to resume an interrupted transfer. Returns the file and its position. A file that is longer than the
/// source starts again from 0.
pub(super) async fn open_part(part: &Path, size: u64) -> Result<(File, u64), Error> {
    let failed = |error: std::io::Error| Error::local_file(part, &error);
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(part).await.map_err(failed)?;
    let mut done = file.metadata().await.map_err(failed)?.len();
    if done > size {
        file.set_len(0).await.map_err(failed)?;
        done = 0;
    }
    file.seek(std::io::SeekFrom::Start(done)).await.map_err(failed)?;
    file.set_max_buf_size(COPY_PIECE);
    Ok((file, done))
}
