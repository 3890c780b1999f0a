//! Staging: files go to a site before a job, and results come back after it. Every file is verified in both directions.
//!
//! Small files go as one stream, a tar archive. A large file goes to the site's cache, named by its SHA-256, once for all
//! processes that need it, and is copied from there. An interrupted upload resumes, and no file is used before its digest
//! is verified. Results are in the object store before the state of the process says that it has ended.

mod inputs;
mod listing;
mod missing;
mod outputs;
mod pattern;
mod values;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_common::digest::Digest;
use baton_common::objects;
use baton_common::relative::BytePath;
use baton_common::spec::on_site::{self, Scope};

pub(crate) use self::inputs::stage_in;
pub(crate) use self::outputs::stage_out;
use super::{Site, Visit};
use crate::author::process::{Context, Wait};
use crate::transport::{self, quote};

/// Files of at least this size go through the cache.
const CACHED_FROM: u64 = 1 << 20;

/// Pause after an error of the object store.
const STORE_PAUSE: Duration = Duration::from_secs(10);

/// The folder below a worker's root for received files.
pub(crate) const FOLDER: &str = "staging";

/// How long incomplete files are kept.
const SCRATCH_AGE_MAX: Duration = Duration::from_secs(7 * 86_400);

/// Files whose digests are requested at a time, so that the answer fits in memory even with the longest names.
const DIGESTS_AT_ONCE: usize = 4_000;

/// Time limit of a verification: a terabyte at 300 MB/s.
const VERIFY_LIMIT: Duration = Duration::from_secs(3600);

/// Why staging did not complete.
pub(crate) enum Error {
    /// The transport failed.
    Site(transport::Error),
    /// Another worker does the same work first, or the object store does not answer.
    Wait(Wait),
    /// A file has an unexpected content; it may still be being written.
    Content(String),
    /// The site or the object store cannot read or write a file: no permission, no such folder.
    Files(String),
    /// The site has no space for files, or a shortage of the resources to handle them.
    Lacks(String),
    /// This machine cannot read or write a file.
    Here {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        error: io::Error,
        /// The same as a sentence.
        text: String,
    },
    /// The spec is wrong: a missing file, a path that leads out of its scope.
    Stage(String),
}

impl From<transport::Error> for Error {
    fn from(error: transport::Error) -> Self {
        // Errors of a command or a file concern the files, not the transport.
        if error.may_pass() {
            return Error::Site(error);
        }
        let text = error.to_string();
        if let transport::Error::File { path, errno: Some(errno), .. } = &error {
            return Error::Here { path: path.into(), error: io::Error::from_raw_os_error(*errno), text };
        }
        if matches!(error, transport::Error::TooMuchOutput) {
            Error::Stage(text)
        } else if names_a_lack(&text) {
            Error::Lacks(text)
        } else {
            Error::Files(text)
        }
    }
}

impl From<objects::Error> for Error {
    fn from(error: objects::Error) -> Self {
        // Wrong keys or a wrong bucket on this worker are not the fault of the process, which is left to another worker.
        if error.is_transient() || matches!(error, objects::Error::Refused { .. } | objects::Error::NoBucket { .. }) {
            return Error::Wait(Wait::pause(STORE_PAUSE));
        }
        let is_asked_too_much = matches!(error, objects::Error::Manifest { .. } | objects::Error::TooLarge { .. });
        let mut of_file = None;
        if let objects::Error::Folder { path, source } | objects::Error::File { path, source } = &error
            && let Some(errno) = source.raw_os_error()
        {
            of_file = Some((path.clone(), io::Error::from_raw_os_error(errno)));
        }
        let text = crate::author::process::Error::failed(error).to_string();
        match of_file {
            Some((path, error)) => Error::Here { path, error, text },
            None if is_asked_too_much => Error::Stage(text),
            None => Error::Files(text),
        }
    }
}

impl From<baton_common::store::Error> for Error {
    fn from(_: baton_common::store::Error) -> Self {
        Error::Wait(Wait::pause(STORE_PAUSE))
    }
}

impl From<crate::author::process::Error> for Error {
    fn from(error: crate::author::process::Error) -> Self {
        Error::Stage(error.to_string())
    }
}

/// Whether the output of a command says, in the system's words, that a resource of the site is exhausted.
fn names_a_lack(text: &str) -> bool {
    const LACKS: [&str; 7] = [
        "no space left on device",
        "disk quota exceeded",
        "read-only file system",
        "input/output error",
        "too many open files",
        "cannot allocate memory",
        "resource temporarily unavailable",
    ];
    let text = text.to_lowercase();
    LACKS.iter().any(|lack| text.contains(lack))
}

/// One staging in one direction.
struct Staging<'a> {
    site: &'a Arc<Site>,
    visit: &'a Visit,
    context: &'a Context,
    dir: &'a str,
}

impl Staging<'_> {
    /// Runs a command whose failure concerns files.
    async fn run(&self, command: &str, stdin: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(self.visit.session.exec(command, stdin, VERIFY_LIMIT).await?.ok()?)
    }

    fn show(&self, line: &str) {
        self.context.live.set_last_line(line);
    }

    /// The SHA-256 of many small files at the site, without those that have vanished.
    async fn digests(
        &self,
        dir: &str,
        paths: impl Iterator<Item = &BytePath>,
    ) -> Result<BTreeMap<BytePath, Digest>, Error> {
        let paths: Vec<&BytePath> = paths.collect();
        let mut digests = BTreeMap::new();
        for some in paths.chunks(DIGESTS_AT_ONCE) {
            let names: Vec<u8> = some.iter().flat_map(|path| [b"./", path.as_bytes(), b"\0"].concat()).collect();
            let command = format!("cd {} && xargs -0 sha256sum -z --", quote(dir));
            let output = self.visit.session.exec(&command, &names, VERIFY_LIMIT).await?;
            // `xargs` exits with 123 if a file could not be read.
            let stdout = if output.exit == Some(123) { output.stdout } else { output.ok()? };
            for line in stdout.split(|byte| *byte == 0).filter(|line| !line.is_empty()) {
                let read = line.split_at_checked(64).and_then(|(digest, path)| {
                    let path = path.strip_prefix(b"  ./")?;
                    Some((path.to_vec().into(), std::str::from_utf8(digest).ok()?.parse().ok()?))
                });
                let (path, digest): (BytePath, Digest) =
                    read.ok_or_else(|| Error::Content("`sha256sum` printed unexpected output".into()))?;
                digests.insert(path, digest);
            }
        }
        Ok(digests)
    }

    /// Shows the progress of a file in a line, after every MiB.
    fn telling(&self, line: impl Fn(u64) -> String + Send + Sync) -> impl Fn(u64) + Send + Sync {
        let live = Arc::clone(&self.context.live);
        let told = AtomicU64::new(u64::MAX);
        move |done| {
            let mib = done >> 20;
            if told.swap(mib, Ordering::Relaxed) != mib {
                live.set_last_line(&line(mib));
            }
        }
    }

    /// The folder of a scope at the site.
    fn scope(&self, scope: Scope) -> Result<String, Error> {
        let session = self.context.spec().session.as_deref();
        Ok(match scope {
            Scope::Task => self.dir.to_owned(),
            Scope::Resource => format!("{}/r", self.visit.root),
            Scope::Session => {
                let session = session.ok_or_else(|| Error::Stage("session:// needs a `session`".into()))?;
                let of_name = |problem| Error::Stage(format!("`session` {problem}; submit it with another name"));
                on_site::check_session(session).map_err(of_name)?;
                format!("{}/s/{session}", self.visit.root)
            }
            Scope::Client | Scope::Store => {
                return Err(Error::Stage(format!("{}:// is not a scope at a site", scope.word())));
            }
        })
    }

    /// A local folder for the received files of this try. It exists until all have arrived, so that transfers can resume.
    fn scratch(&self) -> Result<PathBuf, Error> {
        let path = self.scratch_path();
        if !path.exists() {
            self.remove_old_scratch();
        }
        match std::fs::create_dir_all(&path) {
            Ok(()) => Ok(path),
            Err(error) => Err(Error::Here { text: format!("{}: {error}", path.display()), path, error }),
        }
    }

    /// Removes folders of tries that continued on other workers.
    fn remove_old_scratch(&self) {
        let Ok(entries) = std::fs::read_dir(self.context.root().join(FOLDER)) else { return };
        for entry in entries.flatten() {
            let age = entry.metadata().and_then(|metadata| metadata.modified()).map(|at| at.elapsed());
            if matches!(age, Ok(Ok(age)) if age > SCRATCH_AGE_MAX) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }

    /// The temporary name of an incomplete file in its target folder. It is unique for the try, since another try may
    /// write the same file.
    fn part(&self) -> String {
        format!(".baton-{}-{}", self.context.pid(), self.context.try_number())
    }

    fn scratch_path(&self) -> PathBuf {
        // Another worker on this machine may still work on the same try without knowing that it lost the lease.
        let name = format!("{}-{}-{}", self.context.pid(), self.context.try_number(), self.site.me);
        self.context.root().join(FOLDER).join(name)
    }
}

/// A second name of the script of a try, next to its folder. If this is the only name left, the program removed the
/// folder; otherwise the file system only shows it late.
pub(crate) fn second_name(dir: &str) -> String {
    let (folder, try_number) = dir.rsplit_once('/').unwrap_or((".", dir));
    format!("{folder}/.{try_number}")
}

/// Shell functions that keep paths in their scopes, for a script with the site's folder `root`.
///
/// `inside PATH SCOPE`: whether a path, which need not exist, stays in its scope and outside `.baton` with all links resolved.
/// A scope may be a link to another disk, but not to another folder below the site's.
///
/// `is_batons PATH`: whether a path without links is `.baton` of a sandbox or below it.
fn guards(root: &str) -> String {
    format!("root={}\n{GUARDS}", quote(root))
}

const GUARDS: &str = r#"
real() {
  real=$(readlink -m -- "$1" && echo .) || return 1
  real=${real%??}
}
real "$root/p"; sandboxes=$real
is_batons() {
  case $1/ in
    "$sandboxes"/*/*/.baton/*) ;;
    *) return 1 ;;
  esac
  set -- "${1#"$sandboxes"/*/*/}"
  case $1/ in
    .baton/*) return 0 ;;
  esac
  return 1
}
is_scope() {
  [ "$scope_real" != "$1" ] || return 0
  case $1 in
    "$root"/p/* | "$root"/cache) return 0 ;;
  esac
  for own in "$root" "$root/p" "$root/cache"; do
    real "$own"
    case $scope_real/ in "$real"/*) return 1 ;; esac
    case $real/ in "$scope_real"/*) return 1 ;; esac
  done
}
inside() {
  real "$2" && scope_real=$real || return 1
  is_scope "$2" || { echo "$2 leads to what belongs to Baton, out of its scope" >&2; return 1; }
  real "$1" || return 1
  case $real/ in
    "$scope_real"/*) ;;
    *) echo "$1 leads out of its scope" >&2; return 1 ;;
  esac
  if is_batons "$real" && ! is_batons "$scope_real"; then
    echo "$1 leads to .baton, which belongs to Baton, out of its scope" >&2
    return 1
  fi
}"#;

/// `links_inside FOLDER SCOPE`: whether each link below a folder stays in it, or in the scope if its target is an absolute
/// path.
fn links_inside(root: &str) -> String {
    let each = format!(
        "{}
         folder=$1; scope=$2; shift 2
         for link; do
           case $(readlink \"$link\") in
             /*) inside \"$link\" \"$scope\" ;;
             *) inside \"$link\" \"$folder\" ;;
           esac || exit 1
         done",
        guards(root)
    );
    format!("links_inside() {{ find \"$1\" -type l -exec sh -c {} sh \"$1\" \"$2\" {{}} +; }}", quote(&each))
}
