//! What goes to a site before a job, and what comes back after it: verified in both directions, file by file.
//!
//! Small files go as one stream of a tar archive. A large one goes to the site's cache, named after its SHA-256, once for
//! all processes that need it, and is linked from there; an upload that was cut goes on where it was, and nothing is used
//! before its digest was compared. Results are in the object store before the process's state says that it has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_common::digest::Digest;
use baton_common::objects::{self, Entry, Manifest};
use baton_common::spec::on_site::{self, How, Input, OnSite, Output, Scope, When};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use globset::GlobMatcher;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tokio_util::sync::PollSender;

use super::{Site, Visit, script};
use crate::process::{Context, Wait};
use crate::transport::{self, quote};

/// Files of at least this size go through the cache.
const CACHED_FROM: u64 = 1 << 20;

/// Bytes of the stream of small files that are under way between two tasks.
const STREAM_BYTES: usize = 256 * 1024;

/// Pieces of the stream that brings them, of some 32 KiB each.
const STREAM_PIECES: usize = 16;

/// Objects that are asked for or put at a time: an answer, or a disk, takes longer than the work.
const OBJECTS_AT_ONCE: usize = 16;

/// Most bytes of the file that becomes values.
const VALUES_MAX: usize = 64 * 1024;

/// At the latest after so long a process looks again whether what another sends is there.
const SENT_PAUSE: Duration = Duration::from_secs(20);

/// Pause after the object store did not answer.
const STORE_PAUSE: Duration = Duration::from_secs(10);

/// What has come in part is kept for so long.
const SCRATCH_AGE_MAX: Duration = Duration::from_secs(7 * 86_400);

/// Verifying a file of a terabyte takes longer; nobody stages such.
const VERIFY_LIMIT: Duration = Duration::from_secs(3600);

/// Why staging has not come to its end.
pub(crate) enum Error {
    /// The way to the site is at fault.
    Site(transport::Error),
    /// Another does first what has to be done, or the object store does not answer.
    Wait(Wait),
    /// Something is there with another content than it should have; it may still be written.
    Content(String),
    /// A system does not take or give files: no space, no permission.
    Files(String),
    /// What is asked for is not right: a missing file, a path that leads out.
    Stage(String),
}

impl From<transport::Error> for Error {
    fn from(error: transport::Error) -> Self {
        // What a command or a file says is about the files, and the way is well.
        if error.is_of_transport() {
            Error::Site(error)
        } else if matches!(error, transport::Error::TooMuchOutput) {
            Error::Stage(error.to_string())
        } else {
            Error::Files(error.to_string())
        }
    }
}

impl From<objects::Error> for Error {
    fn from(error: objects::Error) -> Self {
        if error.is_transient() {
            return Error::Wait(Wait::pause(STORE_PAUSE));
        }
        let is_asked_too_much = matches!(error, objects::Error::Manifest { .. } | objects::Error::TooLarge { .. });
        let text = crate::process::Error::failed(error).to_string();
        if is_asked_too_much { Error::Stage(text) } else { Error::Files(text) }
    }
}

impl From<baton_common::store::Error> for Error {
    fn from(_: baton_common::store::Error) -> Self {
        Error::Wait(Wait::pause(STORE_PAUSE))
    }
}

impl From<crate::process::Error> for Error {
    fn from(error: crate::process::Error) -> Self {
        Error::Stage(error.to_string())
    }
}

/// One staging, in one direction.
struct Staging<'a> {
    site: &'a Arc<Site>,
    visit: &'a Visit,
    context: &'a Context,
    dir: &'a str,
}

/// Makes the folder of a try with everything that its job needs, and verifies it.
pub(crate) async fn stage_in(
    site: &Arc<Site>,
    visit: &Visit,
    context: &Context,
    on_site: &OnSite,
    dir: &str,
    script: &str,
) -> Result<(), Error> {
    let staging = Staging { site, visit, context, dir };
    let manifest = match on_site.staged {
        Some(digest) => site.objects.get_manifest(digest).await?.into_entries(),
        None => vec![],
    };
    let (large, small): (Vec<Entry>, Vec<Entry>) = manifest.into_iter().partition(|entry| entry.size >= CACHED_FROM);
    let mut own = script::companions(context.spec());
    own.push((format!("{}/run.sh", script::FOLDER), script.as_bytes().to_vec()));
    staging.send_small(small, own).await?;
    for entry in &large {
        let cached = staging.cached(entry.digest, entry.size, entry.executable).await?;
        staging.link(&cached, &entry.path).await?;
    }
    for (idx, input) in on_site.inputs.iter().enumerate() {
        staging.place(idx, input).await?;
    }
    Ok(())
}

/// Puts what the job has made where the spec wants it; its values and the manifest of what is in the object store become
/// part of the outcome.
pub(crate) async fn stage_out(
    site: &Arc<Site>,
    visit: &Visit,
    context: &Context,
    on_site: &OnSite,
    dir: &str,
    is_ok: bool,
) -> Result<(), Error> {
    let staging = Staging { site, visit, context, dir };
    let wanted: Vec<&Output> = on_site
        .outputs
        .iter()
        .filter(|output| match output.when {
            When::Always => true,
            When::Ok => is_ok,
            When::Error => !is_ok,
        })
        .collect();
    if !wanted.is_empty() {
        let found = staging.list().await?;
        let mut kept: BTreeSet<&str> = BTreeSet::new();
        for output in wanted {
            let matcher = matcher(&output.from)?;
            let matched: Vec<&str> = found.keys().filter(|path| matcher.is_match(path)).map(String::as_str).collect();
            if matched.is_empty() && !output.optional && is_ok {
                return Err(Error::Stage(format!("output: nothing in the sandbox matches `{}`", output.from)));
            }
            match output.to.scope {
                Scope::Store => kept.extend(matched),
                Scope::Client | Scope::Task | Scope::Session | Scope::Resource => {
                    staging.hand_over(output, &matched).await?;
                }
            }
        }
        let kept: Vec<(&str, &Found)> = kept.into_iter().map(|path| (path, &found[path])).collect();
        let manifest = staging.keep(&kept).await?;
        let digest = site.objects.put_manifest(&manifest).await?;
        context.draft.borrow_mut().outcome.results = Some(digest);
    }
    if let Some(path) = &on_site.values {
        match visit.read(&format!("{dir}/{path}")).await? {
            Some(bytes) => set_values(context, path, &bytes)?,
            None if is_ok => return Err(Error::Stage(format!("output: `values: {path}` is not there"))),
            None => {}
        }
    }
    Ok(())
}

fn set_values(context: &Context, path: &str, bytes: &[u8]) -> Result<(), Error> {
    if bytes.len() > VALUES_MAX {
        return Err(Error::Stage(format!("output: `values: {path}` has more than {} KiB", VALUES_MAX / 1024)));
    }
    let values: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(bytes)
        .map_err(|error| Error::Stage(format!("output: `values: {path}` is no JSON object: {error}")))?;
    values.into_iter().for_each(|(name, value)| context.set_value(name, value));
    Ok(())
}

/// A file of the sandbox.
struct Found {
    size: u64,
    executable: bool,
}

fn matcher(pattern: &str) -> Result<GlobMatcher, Error> {
    // A folder stands for everything in it.
    let pattern = if pattern.ends_with('/') { format!("{pattern}**") } else { pattern.to_owned() };
    on_site::glob(&pattern).map(|glob| glob.compile_matcher()).map_err(|error| Error::Stage(format!("out: {error}")))
}

/// The folder of a pattern: all that it matches is below it.
fn base(pattern: &str) -> &str {
    let plain = pattern.find(['*', '?', '[', '{', '\\']).map_or(pattern, |end| &pattern[..end]);
    plain.rfind('/').map_or("", |end| &plain[..=end])
}

impl Staging<'_> {
    /// A command whose failure is about files.
    async fn run(&self, command: &str, stdin: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(self.visit.session.exec(command, stdin, VERIFY_LIMIT).await?.ok()?)
    }

    fn tell(&self, line: &str) {
        self.context.live.set_last_line(line);
    }

    /// The small files and Baton's own, as one stream.
    async fn send_small(&self, entries: Vec<Entry>, own: Vec<(String, Vec<u8>)>) -> Result<(), Error> {
        let mut expected: BTreeMap<String, Digest> =
            own.iter().map(|(path, bytes)| (path.clone(), Digest::of(bytes))).collect();
        expected.extend(entries.iter().map(|entry| (entry.path.clone(), entry.digest)));
        self.tell(&format!("sending {} files", expected.len()));
        let (reader, writer) = tokio::io::duplex(STREAM_BYTES);
        let objects = self.site.objects.clone();
        let runtime = self.context.shared.blocking.clone();
        let packing = self.context.blocking(move || {
            let mut archive = tar::Builder::new(SyncIoBridge::new_with_handle(writer, runtime.clone()));
            for (path, bytes) in &own {
                append(&mut archive, path, bytes, false)?;
            }
            for entry in &entries {
                let bytes = match objects.local_path(entry.digest) {
                    Some(path) => std::fs::read(path)?,
                    None => runtime.block_on(objects.get_bytes(entry.digest, CACHED_FROM)).map_err(io::Error::other)?,
                };
                append(&mut archive, &entry.path, &bytes, entry.executable)?;
            }
            archive.into_inner()?.shutdown()
        });
        let dir = quote(self.dir);
        let command = format!("umask 077; mkdir -p {dir} && tar -xof - -C {dir}");
        let (packed, sent) = tokio::join!(packing, self.visit.session.send(&command, reader));
        sent?.ok()?;
        packed?.map_err(|error| Error::Stage(error.to_string()))?;
        self.verify(self.dir, &expected).await
    }

    /// Compares the SHA-256 of files there with what they should be.
    async fn verify(&self, dir: &str, expected: &BTreeMap<String, Digest>) -> Result<(), Error> {
        let found = self.digests(dir, expected.keys().map(String::as_str)).await?;
        for (path, digest) in expected {
            if found.get(path) != Some(digest) {
                return Err(Error::Content(format!("{path} has arrived with another content")));
            }
        }
        Ok(())
    }

    /// The SHA-256 of many small files there.
    async fn digests(&self, dir: &str, paths: impl Iterator<Item = &str>) -> Result<BTreeMap<String, Digest>, Error> {
        let names: Vec<u8> = paths.flat_map(|path| [b"./", path.as_bytes(), b"\0"].concat()).collect();
        if names.is_empty() {
            return Ok(BTreeMap::new());
        }
        let stdout = self.run(&format!("cd {} && xargs -0 sha256sum -z --", quote(dir)), &names).await?;
        let mut digests = BTreeMap::new();
        for line in stdout.split(|byte| *byte == 0).filter(|line| !line.is_empty()) {
            let line = std::str::from_utf8(line).ok();
            let read = line.and_then(|line| {
                let (digest, path) = line.split_once("  ./")?;
                Some((path.to_owned(), digest.parse::<Digest>().ok()?))
            });
            let (path, digest) = read.ok_or_else(|| Error::Stage("sha256sum has answered nonsense".into()))?;
            digests.insert(path, digest);
        }
        Ok(digests)
    }

    /// A file in the site's cache; it is sent if it is not there, by one worker of the fleet.
    async fn cached(&self, digest: Digest, size: u64, executable: bool) -> Result<String, Error> {
        let cache = format!("{}/cache", self.visit.root);
        let path = format!("{cache}/{digest}{}", if executable { ".x" } else { "" });
        let (folder, quoted) = (quote(&cache), quote(&path));
        // What is used is young.
        let look = format!(
            "umask 077; mkdir -p {folder} && {{ [ ! -f {quoted} ] || {{ touch -c -a {quoted}; echo there; }}; }}"
        );
        if self.run(&look, b"").await?.starts_with(b"there") {
            return Ok(path);
        }
        let permit = format!("sent/{}/{digest}", self.site.name);
        let Some(_sending) = self.site.begin_sending(&permit, &self.context.shared).await? else {
            return Err(Error::Wait(Wait { waits_for: permit, at_most: SENT_PAUSE }));
        };
        self.send_to_cache(digest, size, executable, &path).await.map(|()| path)
    }

    async fn send_to_cache(&self, digest: Digest, size: u64, executable: bool, path: &str) -> Result<(), Error> {
        // Another may have sent it between the look and the permit.
        if self.run(&format!("[ ! -f {} ] || echo there", quote(path)), b"").await?.starts_with(b"there") {
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
            return Err(Error::Content(format!("{digest} has arrived with another content")));
        }
        if self.site.objects.local_path(digest).is_none() {
            let _ = std::fs::remove_file(&source);
        }
        let mode = if executable { 555 } else { 444 };
        self.run(&format!("chmod {mode} {0} && mv -f {0} {1}", quote(&coming), quote(path)), b"").await?;
        self.shrink_cache().await
    }

    /// Tells in a line how far a file is, whenever it is another MiB.
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

    /// Removes what the cache may not keep: the longest unused first, and nothing that a sandbox links.
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

    /// A file of the cache under its name in the sandbox; a hard link, so that the cache cannot lose it.
    async fn link(&self, cached: &str, path: &str) -> Result<(), Error> {
        let to = format!("{}/{path}", self.dir);
        let folder = to.rsplit_once('/').map_or(self.dir, |(folder, _)| folder);
        let (cached, to) = (quote(cached), quote(&to));
        let command =
            format!("umask 077; mkdir -p {} && {{ ln -f {cached} {to} || cp -fp {cached} {to}; }}", quote(folder));
        self.run(&command, b"").await.map(drop)
    }

    /// The folder of a scope at the site.
    fn scope(&self, scope: Scope) -> Result<String, Error> {
        let session = self.context.spec().session.as_deref();
        Ok(match scope {
            Scope::Task => self.dir.to_owned(),
            Scope::Resource => format!("{}/r", self.visit.root),
            Scope::Session => {
                let session = session.ok_or_else(|| Error::Stage("session:// needs a `session`".into()))?;
                format!("{}/s/{session}", self.visit.root)
            }
            Scope::Client | Scope::Store => {
                return Err(Error::Stage(format!("{}:// is no place at a site", scope.word())));
            }
        })
    }

    /// A line of `in` whose source is at the site or in the object store.
    async fn place(&self, idx: usize, input: &Input) -> Result<(), Error> {
        let (source, source_scope) = match input.from.scope {
            Scope::Store => {
                let digest: Digest =
                    input.from.path.parse().map_err(|_| Error::Stage(format!("`{}` is no digest", input.from)))?;
                let cached = self.cached(digest, 0, false).await?;
                (cached, format!("{}/cache", self.visit.root))
            }
            Scope::Session | Scope::Resource | Scope::Task => {
                let scope = self.scope(input.from.scope)?;
                (format!("{scope}/{}", input.from.path), scope)
            }
            Scope::Client => {
                return Err(Error::Stage(format!("`{}` was not captured when it was submitted", input.from)));
            }
        };
        let target_scope = self.scope(input.to.scope)?;
        let name = input.from.path.rsplit('/').find(|part| !part.is_empty()).unwrap_or_default();
        let mut target = format!("{target_scope}/{}", input.to.path);
        if (input.to.path.is_empty() || input.to.path.ends_with('/')) && input.how != How::Unpack {
            target.push_str(name);
        }
        let act = match input.how {
            How::Auto if input.from.scope == Scope::Store => {
                "{ ln -f \"$from\" \"$to\" || cp -fp \"$from\" \"$to\"; }".to_owned()
            }
            How::Auto | How::Link => "ln -sfn \"$from\" \"$to\"".to_owned(),
            // A folder that is copied again is the same one, and none in itself.
            How::Copy => "chmod -R u+w \"$to\" 2>/dev/null; if [ -d \"$from\" ]; then mkdir -p \"$to\" && cp -fRPp \"$from\"/. \"$to\"/; else cp -fRPp \"$from\" \"$to\"; fi \\
                          && chmod -R u+w \"$to\"".to_owned(),
            How::Move => "mv -fT \"$from\" \"$to\"".to_owned(),
            How::Unpack => unpack(idx),
        };
        // A try that is staged again has it; one that follows another takes it from there.
        let taken = if input.how == How::Move {
            "if [ ! -e \"$from\" ]; then
               if [ -e \"$to\" ]; then exit 0; fi
               for old in \"${dir%/*}\"/*\"${to#\"$dir\"}\"; do [ ! -e \"$old\" ] || { from=$old; from_scope=${dir%/*}; }; done
             fi"
        } else {
            ""
        };
        let is_optional = if input.optional { "exit 0" } else { "{ echo \"$from is not there\" >&2; exit 1; }" };
        let script = format!(
            "umask 077
             {INSIDE}
             from={}; to={}; from_scope={}; to_scope={}; dir={}
             mkdir -p \"$from_scope\" \"$to_scope\" || exit 1
             {taken}
             [ -e \"$from\" ] || {is_optional}
             inside \"$from\" \"$from_scope\" || exit 1
             from=$(readlink -f \"$from\")
             mkdir -p \"$(dirname \"$to\")\" && inside \"$(dirname \"$to\")\" \"$to_scope\" || exit 1
             {act}",
            quote(&source),
            quote(&target),
            quote(&source_scope),
            quote(&target_scope),
            quote(self.dir),
        );
        self.run(&script, b"").await.map(drop)
    }

    /// Every file of the sandbox, but for Baton's own; a link that leads out of it is none of them.
    async fn list(&self) -> Result<BTreeMap<String, Found>, Error> {
        let script = format!(
            "cd {} || exit 1
             dir=$(pwd -P)
             find . -path ./.baton -prune -o -type f -printf '%s %m %P\\0'
             find . -path ./.baton -prune -o -type l -print | while read -r link; do
               target=$(readlink -f \"$link\") || continue
               case $target in \"$dir\"/*) [ ! -f \"$target\" ] || printf '%s 600 %s\\0' \"$(wc -c < \"$target\")\" \"${{link#./}}\" ;; esac
             done",
            quote(self.dir)
        );
        let stdout = self.run(&script, b"").await?;
        let mut found = BTreeMap::new();
        for line in stdout.split(|byte| *byte == 0).filter(|line| !line.is_empty()) {
            // A name that is no UTF-8 matches no pattern.
            let Ok(line) = std::str::from_utf8(line) else { continue };
            let mut fields = line.splitn(3, ' ');
            let (Some(size), Some(mode), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
            let executable = u32::from_str_radix(mode, 8).is_ok_and(|mode| mode & 0o100 != 0);
            found.insert(path.to_owned(), Found { size: size.trim().parse().unwrap_or(0), executable });
        }
        Ok(found)
    }

    /// Files of the sandbox to a scope of the site, each under its path below the folder of the pattern. Whoever does this
    /// again does the same again: what is moved is there as well as in the sandbox, as one file.
    async fn hand_over(&self, output: &Output, paths: &[&str]) -> Result<(), Error> {
        let scope = self.scope(output.to.scope)?;
        let to = output.to.path.trim_end_matches('/');
        let is_folder = to.len() < output.to.path.len() || to.is_empty() || !paths.contains(&output.from.as_str());
        let base = base(&output.from);
        let mut pairs = Vec::new();
        for path in paths {
            let name = path.strip_prefix(base).unwrap_or(path);
            let target = if is_folder { format!("{to}/{name}") } else { to.to_owned() };
            pairs.extend([path.as_bytes(), b"\0", target.as_bytes(), b"\0"].concat());
        }
        let act = match output.how {
            How::Move => "{ ln -fL \"$from\" \"$to.part\" 2>/dev/null || cp -fpT \"$from\" \"$to.part\"; }",
            How::Link => "ln -sfnT \"$from\" \"$to.part\"",
            How::Auto | How::Copy | How::Unpack => "cp -fpT \"$from\" \"$to.part\"",
        };
        let script = format!(
            "{INSIDE}
             dir={}; scope={}
             while [ $# -gt 1 ]; do
               from=$dir/$1; to=$scope/$2; shift 2
               mkdir -p \"${{to%/*}}\" || exit 1
               inside \"${{to%/*}}\" \"$scope\" || exit 255
               {act} && mv -fT \"$to.part\" \"$to\" || exit 1
             done",
            quote(self.dir),
            quote(&scope),
        );
        // As many at a time as a command can take.
        let command = format!("umask 077; mkdir -p {} && xargs -0 -n 64 sh -c {} sh", quote(&scope), quote(&script));
        let output = self.visit.session.exec(&command, &pairs, VERIFY_LIMIT).await?;
        // So `xargs` tells that a command has ended with 255.
        let is_refused = output.exit == Some(124);
        output.ok().map(drop).map_err(|error| if is_refused { Error::Stage(error.to_string()) } else { error.into() })
    }

    /// Files of the sandbox into the object store; what it has already is not fetched.
    async fn keep(&self, files: &[(&str, &Found)]) -> Result<Manifest, Error> {
        let (large, small): (Vec<_>, Vec<_>) = files.iter().partition(|(_, found)| found.size >= CACHED_FROM);
        let mut digests = self.digests(self.dir, small.iter().map(|(path, _)| *path)).await?;
        let objects = &self.site.objects;
        let known = &digests;
        let missing: BTreeMap<&str, Digest> = futures_util::stream::iter(small)
            .map(|(path, found)| async move {
                let digest = *known.get(path).ok_or_else(|| Error::Stage(format!("{path} has vanished")))?;
                Ok::<_, Error>((!objects.renew(digest, found.size).await?).then_some((path, digest)))
            })
            .buffered(OBJECTS_AT_ONCE)
            .try_filter_map(|missing| std::future::ready(Ok(missing)))
            .try_collect()
            .await?;
        self.keep_small(&missing).await?;
        for (path, found) in large {
            digests.insert((*path).to_owned(), self.keep_large(path, found.size).await?);
        }
        let entries = files.iter().map(|(path, found)| {
            let digest = digests.get(*path).ok_or_else(|| Error::Stage(format!("{path} has vanished")))?;
            let (path, digest) = ((*path).to_owned(), *digest);
            Ok(Entry { path, digest, size: found.size, executable: found.executable })
        });
        let manifest = Manifest::new(entries.collect::<Result<_, Error>>()?)?;
        // It is no loss if this stays: nobody else uses it.
        let _ = std::fs::remove_dir_all(self.scratch_path());
        Ok(manifest)
    }

    /// Small files, as one stream that is stored as it comes.
    async fn keep_small(&self, files: &BTreeMap<&str, Digest>) -> Result<(), Error> {
        if files.is_empty() {
            return Ok(());
        }
        self.tell(&format!("fetching {} files", files.len()));
        let names: Vec<u8> = files.keys().flat_map(|path| [b"./", path.as_bytes(), b"\0"].concat()).collect();
        let list = quote(&format!("{}/{}/fetch", self.dir, script::FOLDER));
        self.run(&format!("cat > {list}"), &names).await?;
        let (pieces, mut pieces_rx) = tokio::sync::mpsc::channel(STREAM_PIECES);
        let reader = StreamReader::new(futures_util::stream::poll_fn(move |context| {
            pieces_rx.poll_recv(context).map(|piece: Option<Bytes>| piece.map(Ok::<_, io::Error>))
        }));
        let (files_tx, mut files_rx) = tokio::sync::mpsc::channel::<(String, Vec<u8>)>(OBJECTS_AT_ONCE);
        let runtime = self.context.shared.blocking.clone();
        let unpacking = self.context.blocking(move || {
            let mut archive = tar::Archive::new(SyncIoBridge::new_with_handle(reader, runtime));
            for entry in archive.entries()? {
                let entry = entry?;
                // No name of the far end becomes a path here.
                let path = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
                let mut bytes = Vec::new();
                entry.take(CACHED_FROM).read_to_end(&mut bytes)?;
                if files_tx.blocking_send((path, bytes)).is_err() {
                    break;
                }
            }
            // What follows the last file is nothing, but it has to be taken.
            io::copy(&mut archive.into_inner(), &mut io::sink())?;
            Ok::<_, io::Error>(())
        });
        let command =
            format!("cd {} && tar -chf - --hard-dereference --null --verbatim-files-from -T {list}", quote(self.dir));
        let receiving = self.visit.session.receive(&command, PollSender::new(pieces));
        let storing = futures_util::stream::poll_fn(move |context| files_rx.poll_recv(context))
            .map(|(path, bytes)| async move { Ok::<_, Error>((self.site.objects.put_bytes(bytes).await?, path)) })
            .buffer_unordered(OBJECTS_AT_ONCE)
            .try_filter(|(digest, path)| std::future::ready(files.get(path.as_str()) == Some(digest)))
            .try_fold(0, |n_stored, _| std::future::ready(Ok(n_stored + 1)));
        let (unpacked, received, stored) = tokio::join!(unpacking, receiving, storing);
        let n_stored = stored?;
        let received = match received {
            // Nobody took what came: whoever should have says why.
            Err(error @ transport::Error::File { .. }) => {
                unpacked?.map_err(|error| Error::Files(error.to_string()))?;
                return Err(error.into());
            }
            received => received?,
        };
        // So `tar` says that a file has changed or vanished while it was read.
        if received.exit == Some(1) {
            return Err(Error::Content(received.complaint()));
        }
        received.ok()?;
        unpacked?.map_err(|error| Error::Files(error.to_string()))?;
        if n_stored < files.len() {
            let text =
                format!("{} files have come with another content, or are still being written", files.len() - n_stored);
            return Err(Error::Content(text));
        }
        Ok(())
    }

    /// A large file. Its digest says whether it has to come at all; meanwhile it comes, from where it was cut before.
    async fn keep_large(&self, path: &str, size: u64) -> Result<Digest, Error> {
        let (session, objects) = (&self.visit.session, &self.site.objects);
        let there = format!("{}/{path}", self.dir);
        let here = self.scratch()?.join(Digest::of(path.as_bytes()).to_string());
        let progress = self.telling(|mib| format!("fetched {mib} of {} MiB of {path}", size >> 20));
        let is_known = async |digest| Ok::<_, Error>(objects.renew(digest, size).await?);
        let (digest, came) = session.get_unless(&there, size, &here, &progress, is_known).await?;
        let Some(came) = came else { return Ok(digest) };
        if came != digest || std::fs::metadata(&here).map(|meta| meta.len()).ok() != Some(size) {
            let _ = std::fs::remove_file(&here);
            let text = format!("{path} has come with another content, or is still being written");
            return Err(Error::Content(text));
        }
        objects.take_file(&here, digest, size).await?;
        Ok(digest)
    }

    /// A folder on this machine for what comes to this try; it stays until all has come, so that this can go on.
    fn scratch(&self) -> Result<PathBuf, Error> {
        let path = self.scratch_path();
        if !path.exists() {
            self.remove_old_scratch();
        }
        std::fs::create_dir_all(&path).map_err(|error| Error::Files(format!("{}: {error}", path.display())))?;
        Ok(path)
    }

    /// Whoever goes on with a try elsewhere leaves here what had come.
    fn remove_old_scratch(&self) {
        let Ok(entries) = std::fs::read_dir(self.context.root().join("staging")) else { return };
        for entry in entries.flatten() {
            let age = entry.metadata().and_then(|metadata| metadata.modified()).map(|at| at.elapsed());
            if matches!(age, Ok(Ok(age)) if age > SCRATCH_AGE_MAX) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }

    fn scratch_path(&self) -> PathBuf {
        // Another worker on this machine may be at the same try, and not know yet that it is not its own any more.
        let name = format!("{}-{}-{}", self.context.pid(), self.context.attempt(), self.site.me);
        self.context.root().join("staging").join(name)
    }
}

fn append(archive: &mut tar::Builder<impl Write>, path: &str, bytes: &[u8], executable: bool) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(if executable { 0o700 } else { 0o600 });
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    header.set_mtime(now.as_secs());
    archive.append_data(&mut header, path, bytes)
}

/// `inside PATH SCOPE`: whether a path stays in its scope, with all links resolved.
const INSIDE: &str = r#"inside() {
  case "$(readlink -f "$1")/" in
    "$(readlink -f "$2")"/*) return 0 ;;
  esac
  echo "$1 leads out of its scope" >&2
  return 1
}"#;

/// Unpacks an archive beside its place, refuses what leads out of it, and moves it there.
fn unpack(idx: usize) -> String {
    format!(
        "work=\"$dir/.baton/unpack.{idx}\"
         rm -rf \"$work\" && mkdir -p \"$work\" \"$to\" || exit 1
         if tar -tf \"$from\" | grep -Eq '^/|(^|/)\\.\\.(/|$)'; then echo \"$from has a path that leads out of it\" >&2; exit 1; fi
         tar -xof \"$from\" -C \"$work\" || exit 1
         find \"$work\" -type l | while read -r link; do
           target=$(readlink -m \"$link\")
           case $target in \"$(readlink -f \"$work\")\"/*) ;; *) echo \"$from has a link that leads out of it: $link\" >&2; exit 1 ;; esac
         done || exit 1
         cp -RPp \"$work\"/. \"$to\"/ && rm -rf \"$work\""
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pattern_matches_is_below_its_folder() {
        let patterns = ["a", "a/b", "a/", "a/b/*.c", "*", "**/c", "a/b*/c", "a/[bc]/d", "a/{b,c}"];
        let bases = ["", "a/", "a/", "a/b/", "", "", "a/", "a/", "a/"];
        assert_eq!(patterns.map(base), bases);
    }
}
