//! Stage-in: the inputs of a job go to its site.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_common::digest::Digest;
use baton_common::objects::{Entry, Manifest};
use baton_common::relative::BytePath;
use baton_common::spec::on_site::{self, How, Input, OnSite, RESERVED, Scope};
use tokio_util::io::SyncIoBridge;

use super::{CACHED_FROM, Error, Staging, guards, links_inside, second_name};
use crate::author::process::{Context, Wait};
use crate::site::{Site, Visit, script};
use crate::transport::quote;

/// Buffer, in bytes, between the task that packs small files and the one that sends them.
const STREAM_BYTES: usize = 256 * 1024;

/// The longest pause before a process checks again for a file that another worker sends.
const SENT_PAUSE: Duration = Duration::from_secs(20);

/// The modification time of a verified file of the cache, in seconds since 1970: long ago. A file that was written to
/// later has another one and is not used.
const WHOLE_SINCE: u32 = 86_400;

/// Prints `there` if the cache has an unchanged verified file, and updates its access time, by which the cache shrinks.
fn intact(path: &str) -> String {
    let path = quote(path);
    format!("if [ \"$(stat -c %Y {path} 2>/dev/null)\" = {WHOLE_SINCE} ]; then touch -c -a {path}; echo there; fi")
}

/// Makes the folder of a try with all inputs of its job, and verifies them.
pub(crate) async fn stage_in(
    site: &Arc<Site>,
    visit: &Visit,
    context: &Context,
    on_site: &OnSite,
    dir: &str,
    own: Vec<(String, Vec<u8>)>,
) -> Result<(), Error> {
    let staging = Staging { site, visit, context, dir };
    let manifest = match on_site.staged {
        Some(digest) => site.objects.get_manifest(digest).await?,
        None => Manifest::default(),
    };
    let (entries, folders) = manifest.into_parts();
    if let Some(path) = entries.iter().map(|entry| &entry.path).chain(&folders).find(|path| is_batons(path)) {
        return Err(Error::Stage(format!("{path} cannot go to {RESERVED}, which belongs to Baton")));
    }
    let (large, small): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(|entry| entry.size >= CACHED_FROM);
    staging.send_small(small, folders, own).await?;
    for entry in &large {
        let cached = staging.cached(entry.digest, entry.size, entry.executable).await?;
        // At once, before the cache removes the file.
        staging.copy_cached(&cached, &entry.path).await?;
    }
    for (idx, input) in on_site.inputs.iter().enumerate() {
        staging.place(idx, input).await?;
    }
    Ok(())
}

/// Whether a path of a manifest is in Baton's own folder, outside the part for files that wait for another place.
fn is_batons(path: &BytePath) -> bool {
    let mut parts = path.as_bytes().split(|byte| *byte == b'/');
    parts.next() == Some(RESERVED.as_bytes()) && parts.next() != Some(on_site::WAITING.as_bytes())
}

/// A path at the site and the folder of its scope.
struct At {
    path: String,
    scope: String,
}

impl Staging<'_> {
    /// Sends the small files, empty folders and Baton's own files as one stream.
    async fn send_small(
        &self,
        entries: Vec<Entry>,
        folders: Vec<BytePath>,
        own: Vec<(String, Vec<u8>)>,
    ) -> Result<(), Error> {
        let mut expected: BTreeMap<BytePath, Digest> =
            own.iter().map(|(path, bytes)| (path.clone().into(), Digest::of(bytes))).collect();
        expected.extend(entries.iter().map(|entry| (entry.path.clone(), entry.digest)));
        self.show(&format!("sending {} files", expected.len()));
        let (reader, writer) = tokio::io::duplex(STREAM_BYTES);
        let objects = self.site.objects.clone();
        let runtime = self.context.facilities.blocking.clone();
        let packing = self.context.blocking(move || {
            let mut archive = tar::Builder::new(SyncIoBridge::new_with_handle(writer, runtime.clone()));
            for (path, bytes) in &own {
                append(&mut archive, Path::new(path), bytes, false)?;
            }
            for folder in &folders {
                append_folder(&mut archive, folder.as_path())?;
            }
            for entry in &entries {
                // If there is no local object, the store returns it or an error with its name.
                let local = objects.local_path(entry.digest).and_then(|path| std::fs::read(path).ok());
                let bytes = match local {
                    Some(bytes) => bytes,
                    None => runtime.block_on(objects.get_bytes(entry.digest, CACHED_FROM))?,
                };
                append(&mut archive, entry.path.as_path(), &bytes, entry.executable)?;
            }
            let finish = || archive.into_inner()?.shutdown();
            finish().map_err(not_packed)
        });
        let (dir, second) = (quote(self.dir), quote(&second_name(self.dir)));
        let command = format!(
            "umask 077; mkdir -p {dir} && tar -xof - -C {dir} || exit 1
             ln -fT {dir}/{}/run.sh {second} 2>/dev/null || :",
            script::FOLDER
        );
        let (packed, sent) = tokio::join!(packing, self.visit.session.send(&command, reader));
        sent?.ok()?;
        packed??;
        self.verify(self.dir, &expected).await
    }

    /// Verifies the SHA-256 of files at the site.
    async fn verify(&self, dir: &str, expected: &BTreeMap<BytePath, Digest>) -> Result<(), Error> {
        let found = self.digests(dir, expected.keys()).await?;
        for (path, digest) in expected {
            if found.get(path) != Some(digest) {
                return Err(Error::Content(format!("{path} arrived with another content")));
            }
        }
        Ok(())
    }

    /// Returns a file in the site's cache. If it is missing, one worker of the fleet sends it.
    async fn cached(&self, digest: Digest, size: u64, executable: bool) -> Result<String, Error> {
        let cache = format!("{}/cache", self.visit.root);
        let path = format!("{cache}/{digest}{}", if executable { ".x" } else { "" });
        let look = format!("umask 077; mkdir -p {} && {{ {}; }}", quote(&cache), intact(&path));
        if self.run(&look, b"").await?.starts_with(b"there") {
            return Ok(path);
        }
        let permit = format!("sent/{}/{digest}", self.site.name);
        let Some(_sending) = self.site.begin_sending(&permit).await? else {
            return Err(Error::Wait(Wait { waits_for: permit, at_most: SENT_PAUSE }));
        };
        self.send_to_cache(digest, size, executable, &path).await.map(|()| path)
    }

    async fn send_to_cache(&self, digest: Digest, size: u64, executable: bool, path: &str) -> Result<(), Error> {
        // Another worker may have sent it before this one got the permit.
        if self.run(&intact(path), b"").await?.starts_with(b"there") {
            return Ok(());
        }
        let source = match self.site.objects.local_path(digest) {
            Some(path) => path,
            None => {
                let path = self.scratch()?.join(digest.to_string());
                self.site.objects.get_file(digest, &path, |_| ()).await?;
                path
            }
        };
        let coming = format!("{path}.new");
        let progress = self.telling(|mib| format!("sent {mib} of {} MiB of {digest}", size >> 20));
        if self.visit.session.put(&source, &coming, &progress).await? != digest {
            self.run(&format!("rm -f {}", quote(&coming)), b"").await?;
            return Err(Error::Content(format!("{digest} arrived with another content")));
        }
        if self.site.objects.local_path(digest).is_none() {
            let _ = std::fs::remove_file(&source);
        }
        let mode = if executable { 555 } else { 444 };
        let (coming, path) = (quote(&coming), quote(path));
        let take = format!("chmod {mode} {coming} && touch -m -d @{WHOLE_SINCE} {coming} && mv -f {coming} {path}");
        self.run(&take, b"").await?;
        self.shrink_cache().await
    }

    /// Shrinks the cache to its limits: the longest unused file goes first. Files that a sandbox of an earlier version
    /// links stay.
    async fn shrink_cache(&self) -> Result<(), Error> {
        let cache = self.site.config.cache;
        let script = format!(
            "cd {} || exit 0
             total=$(du -sk . | cut -f 1)
             find . -maxdepth 1 -type f -links 1 -printf '%A@ %k %P\\n' | sort -n | while read -r at size name; do
               age=$(( $(date +%s) - ${{at%.*}} ))
               case $name in *.part|*.new) [ $age -gt 86400 ] || continue ;; esac
               [ $age -gt {} ] || [ $total -gt {} ] || continue
               [ $age -gt 60 ] || continue
               rm -f \"$name\"; total=$(( total - size ))
             done",
            quote(&format!("{}/cache", self.visit.root)),
            cache.max_age.as_secs(),
            cache.max_bytes >> 10
        );
        self.run(&script, b"").await.map(drop)
    }

    /// Copies a file of the cache into the sandbox, so that a write of the program changes no input of another process.
    /// Where the file system supports it, the copy shares its blocks.
    async fn copy_cached(&self, cached: &str, path: &BytePath) -> Result<(), Error> {
        let script = "case $2 in */*) mkdir -p \"./${2%/*}\" || exit 1 ;; esac
             cp -T --reflink=auto --remove-destination \"$1\" \"./$2\" && chmod u+w \"./$2\"";
        let (dir, script) = (quote(self.dir), quote(script));
        let command = format!("umask 077; cd {dir} && xargs -0 sh -c {script} sh");
        // The path goes by standard input: it need not be UTF-8, unlike a command.
        let names = [cached.as_bytes(), b"\0", path.as_bytes(), b"\0"].concat();
        self.run(&command, &names).await.map(drop)
    }

    /// Puts an input into its place whose source is at the site or in the object store. Idempotent.
    async fn place(&self, idx: usize, input: &Input) -> Result<(), Error> {
        let source = match input.from.scope {
            Scope::Store => {
                let digest = input.from.path.parse();
                let digest: Digest = digest.map_err(|_| Error::Stage(format!("`{}` is not a digest", input.from)))?;
                let cached = self.cached(digest, 0, false).await?;
                At { path: cached, scope: format!("{}/cache", self.visit.root) }
            }
            Scope::Task | Scope::Session | Scope::Resource | Scope::Client => self.source(input)?,
        };
        let scope = self.scope(input.to.scope)?;
        let path = input.to.path.trim_end_matches('/');
        let is_whole_scope = path.is_empty();
        let target = if is_whole_scope { scope.clone() } else { format!("{scope}/{path}") };
        let script = self.placing(idx, input, &source, &At { path: target, scope }, is_whole_scope);
        self.run(&script, b"").await.map(drop)
    }

    /// The source of an input at the site.
    fn source(&self, input: &Input) -> Result<At, Error> {
        Ok(match input.from.scope {
            // Files that were staged for another place wait in a folder of Baton's.
            Scope::Task => {
                let waiting = format!("{}/{RESERVED}/{}", self.dir, on_site::WAITING);
                let path = format!("{}/{}", self.dir, input.from.path.trim_end_matches('/'));
                let scope = if path.starts_with(&format!("{waiting}/")) { waiting } else { self.dir.to_owned() };
                At { path, scope }
            }
            Scope::Session | Scope::Resource => {
                let scope = self.scope(input.from.scope)?;
                At { path: format!("{scope}/{}", input.from.path.trim_end_matches('/')), scope }
            }
            Scope::Client | Scope::Store => {
                return Err(Error::Stage(format!("`{}` was not captured at its submission", input.from)));
            }
        })
    }

    /// The script that puts an input into its place.
    fn placing(&self, idx: usize, input: &Input, from: &At, to: &At, is_whole_scope: bool) -> String {
        let act = match input.how {
            How::Auto if input.from.scope == Scope::Store => "copy_file && touch \"$to\"",
            // The folder of a scope exists already and cannot become a link.
            How::Auto if is_whole_scope => "copy",
            How::Auto | How::Link => "ln -sfnT \"$from\" \"$to\"",
            How::Copy => "copy",
            How::Move => {
                "{ [ ! -d \"$from\" ] || links_inside \"$from\" \"$from_scope\"; } && mv -fT \"$from\" \"$to\""
            }
            How::Unpack => "unpack",
        };
        // If this try is staged again, the file is moved already; a later try takes it from the sandbox of an earlier
        // one.
        let taken = if input.how == How::Move {
            "if [ ! -e \"$from\" ]; then
               if [ -e \"$to\" ]; then exit 0; fi
               for old in \"${dir%/*}\"/*\"${to#\"$dir\"}\"; do [ ! -e \"$old\" ] || { from=$old; from_scope=${dir%/*}; }; done
             fi"
        } else {
            ""
        };
        let is_optional = if input.optional { "exit 0" } else { "{ echo \"$from is missing\" >&2; exit 1; }" };
        let is_folder = if input.from.is_folder() {
            "[ -d \"$from\" ] || { echo \"$from is a file; write it without the / at its end\" >&2; exit 1; }"
        } else {
            ""
        };
        let parent = if is_whole_scope { "" } else { "may_take \"$to\" && mkdir -p \"${to%/*}\" || exit 1" };
        format!(
            "umask 077
             {}
             {}
             {PLACING}
             from={}; to={}; from_scope={}; to_scope={}; dir={}; part={}; work={}
             mkdir -p \"$from_scope\" \"$to_scope\" || exit 1
             {taken}
             [ -e \"$from\" ] || {is_optional}
             {is_folder}
             inside \"$from\" \"$from_scope\" || exit 1
             from=$(readlink -f \"$from\")
             {parent}
             {act}",
            guards(&self.visit.root),
            links_inside(&self.visit.root),
            quote(&from.path),
            quote(&to.path),
            quote(&from.scope),
            quote(&to.scope),
            quote(self.dir),
            quote(&self.part()),
            quote(&format!("{}/{}/place.{idx}", self.dir, script::FOLDER)),
        )
    }
}

fn append(archive: &mut tar::Builder<impl Write>, path: &Path, bytes: &[u8], executable: bool) -> Result<(), Error> {
    let mut header = header(if executable { 0o700 } else { 0o600 });
    header.set_size(bytes.len() as u64);
    archive.append_data(&mut header, path, bytes).map_err(not_packed)
}

fn append_folder(archive: &mut tar::Builder<impl Write>, path: &Path) -> Result<(), Error> {
    let mut header = header(0o700);
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    archive.append_data(&mut header, path, io::empty()).map_err(not_packed)
}

fn header(mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    header.set_mtime(now.as_secs());
    header
}

/// The error of a stream that was not read completely; the command that reads it reports the cause.
fn not_packed(error: io::Error) -> Error {
    Error::Stage(error.to_string())
}

/// Shell functions of [`Staging::place`] that copy a file or a folder for the program. Their variables are `from`, a file
/// or a folder without links; `to`; the folders of the scopes of both; `part`, the name of an incomplete file; and
/// `work`, an empty working folder.
///
/// A file is put into its place by a rename, and the files of a folder by links. So an existing file, which may be a link
/// to a shared scope, is replaced and never written to.
const PLACING: &str = r#"
may_take() {
  inside "${1%/*}" "$to_scope" || return 1
  if is_batons "$real/${1##*/}"; then
    echo "$1 is .baton, which belongs to Baton" >&2
    return 1
  fi
}
copy() {
  if [ -d "$from" ]; then copy_folder
  elif [ -f "$from" ]; then copy_file
  else echo "$from is neither a file nor a folder" >&2; return 1
  fi
}
copy_file() {
  part=${to%/*}/$part
  rm -f "$part"
  cp -T --reflink=auto --preserve=mode,timestamps "$from" "$part" && chmod u+w "$part" && mv -fT "$part" "$to" ||
    { rm -f "$part"; return 1; }
}
copy_folder() {
  new_work && cp -RP --preserve=timestamps "$from"/. "$work"/ && links_inside "$work" "$from_scope" && merge
}
unpack() {
  if tar -tf "$from" | grep -Eq '^/|(^|/)\.\.(/|$)'; then
    echo "$from has a path that leads out of it" >&2
    return 1
  fi
  new_work && tar -xof "$from" -C "$work" && links_inside "$work" "$work" && merge
}
new_work() {
  chmod -R u+w "$work" 2>/dev/null
  rm -rf "$work" && mkdir -p "$work"
}
merge() {
  inside "$to" "$to_scope" || return 1
  if is_batons "$real/.baton" && { [ -e "$work/.baton" ] || [ -L "$work/.baton" ]; }; then
    echo "$from has .baton, which belongs to Baton in task://; take another folder for it" >&2
    return 1
  fi
  mkdir -p "$to" && chmod -R u+w "$work" || return 1
  for again in 1 2 3; do
    # Another process may write the same files at the same time. Files on another disk cannot be linked.
    cp -RPlf "$work"/. "$to"/ 2>/dev/null && break
    cp -RP --preserve=timestamps --remove-destination "$work"/. "$to"/ && break
    [ $again != 3 ] || return 1
  done
  rm -rf "$work"
}"#;
