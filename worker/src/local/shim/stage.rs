//! The second stage: the process that becomes the program.
//!
//! It exists because the steps between fork and exec (parent-death signal, session) are safe code only in a separate
//! process. It reads the program's environment from its standard input, so a variable such as LD_LIBRARY_PATH affects the
//! program but not this stage.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use baton_common::lack::Lack;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal, setsid};
use serde::{Deserialize, Serialize};

use crate::machine::{open_files, shortage};

/// The shell's exit code for a program that does not exist.
const EXIT_NOT_FOUND: u8 = 127;
/// The shell's exit code for a program that could not be executed.
const EXIT_NOT_EXECUTABLE: u8 = 126;

/// The program that the second stage executes.
#[derive(Serialize, Deserialize)]
pub(super) struct Image {
    /// The shim's process id.
    pub(super) parent: u32,
    pub(super) argv: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) stdin: Option<String>,
    pub(super) stdout: PathBuf,
    pub(super) open_files: Option<u64>,
}

/// The second stage's report to the shim that it could not execute the program.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct NotExecuted {
    pub(super) message: String,
    pub(super) errno: Option<i32>,
    /// The cause is a shortage of the machine. An error of the program itself counts as the program's end.
    pub(super) is_of_machine: bool,
}

/// Returns a file in memory with this text, at its start. A pipe would have to be filled while it is read.
pub(super) fn memory_file(name: &str, text: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(text)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Becomes the program. Standard input holds the [`Image`], standard output is a pipe for the report of a failure, and
/// standard error is the program's.
pub(super) fn main() -> ExitCode {
    // Standard output becomes the program's, so the pipe to the shim moves to another descriptor. A successful exec
    // closes it, and the shim reads the end of the pipe without a message.
    let to_shim = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    let (error, message, code, is_of_machine) = match become_program() {
        Ok((error, program)) => {
            let (message, code) = describe(&error, &program);
            // A damaged program file gives the same errno as a damaged disk of the worker.
            let lack = shortage::lack_of(&error);
            let is_of_machine = matches!(lack, Some(Lack::OpenFiles | Lack::Memory | Lack::Processes));
            (error, message, code, is_of_machine)
        }
        Err(error) => {
            let message = format!("could not prepare the program: {error}");
            (error, message, EXIT_NOT_EXECUTABLE, true)
        }
    };
    // A full disk must not hide the exit code.
    let _ = writeln!(io::stderr(), "baton: {message}");
    let failure = NotExecuted { message, errno: error.raw_os_error(), is_of_machine };
    if let Ok(mut to_shim) = to_shim {
        let _ = to_shim.write_all(&serde_json::to_vec(&failure).unwrap_or_default());
    }
    ExitCode::from(code)
}

/// Returns only if the program could not be executed, with the error and its name.
fn become_program() -> io::Result<(io::Error, String)> {
    let mut order = Vec::new();
    io::stdin().read_to_end(&mut order)?;
    let image: Image = serde_json::from_slice(&order)?;

    setsid()?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the signal was requested.
    if getppid().map(Pid::as_raw_pid) != i32::try_from(image.parent).ok() {
        return Err(io::Error::other("the shim is gone"));
    }

    if let Some(limit) = image.open_files {
        open_files::set(limit)?;
    }
    let stdin = match &image.stdin {
        Some(text) => Stdio::from(memory_file("stdin", text.as_bytes())?),
        None => Stdio::null(),
    };
    let stdout = File::options().append(true).open(&image.stdout)?;
    let (program, arguments) = image.argv.split_first().ok_or_else(|| io::Error::other("no program is named"))?;
    let error = Command::new(program).args(arguments).env_clear().envs(&image.env).stdin(stdin).stdout(stdout).exec();
    Ok((error, program.clone()))
}

fn describe(error: &io::Error, program: &str) -> (String, u8) {
    if error.kind() == io::ErrorKind::NotFound {
        (format!("program `{program}` not found, or the interpreter that it names"), EXIT_NOT_FOUND)
    } else if error.kind() == io::ErrorKind::ArgumentListTooLong {
        let text =
            "its arguments and variables are longer than the system passes on; put them into a file or into `stdin`";
        (format!("program `{program}` could not be executed: {text}"), EXIT_NOT_EXECUTABLE)
    } else {
        (format!("program `{program}` could not be executed: {error}"), EXIT_NOT_EXECUTABLE)
    }
}
