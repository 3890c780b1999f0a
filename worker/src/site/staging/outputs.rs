//! Stage-out: the results of a job go to the object store and to scopes of the site.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::Arc;

use baton_common::digest::Digest;
use baton_common::objects::{Entry, Manifest};
use baton_common::relative::BytePath;
use baton_common::spec::on_site::{How, OnSite, Output, Scope, When};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use tokio_util::io::{StreamReader, SyncIoBridge};
use tokio_util::sync::PollSender;

use super::listing::Found;
use super::missing::Missing;
use super::pattern::{Pattern, base, matched};
use super::{CACHED_FROM, Error, Staging, guards, values};
use crate::author::process::Context;
use crate::site::{Site, Visit, script};
use crate::transport::{self, quote};

/// Pieces, of some 32 KiB each, of the stream of small files that wait to be read.
const STREAM_PIECES: usize = 16;

/// Concurrent requests to the object store: an answer or a disk takes longer than the work.
const OBJECTS_AT_ONCE: usize = 16;

/// The exits of the script that prints the values: the path is missing, outside the sandbox, not a file, or unreadable.
const ABSENT: i32 = 44;
const REFUSED: i32 = 45;
const NO_FILE: i32 = 46;
const UNREADABLE: i32 = 47;

/// Puts the results of a job where the spec wants them. Its values and the manifest of the stored files become part of
/// the outcome. Existing results are kept even if others are missing; returns the missing ones.
pub(crate) async fn stage_out(
    site: &Arc<Site>,
    visit: &Visit,
    context: &Context,
    on_site: &OnSite,
    dir: &str,
    is_ok: bool,
) -> Result<Missing, Error> {
    let staging = Staging { site, visit, context, dir };
    let mut missing = Missing::default();
    match staging.files(on_site, is_ok, &mut missing).await {
        // The cause does not pass, and another run of the program would not help.
        Err(Error::Stage(text)) => missing.add(text),
        kept => kept?,
    }
    if let Some(path) = &on_site.values {
        match staging.values(path).await? {
            Values::File(bytes) => match values::read(&bytes) {
                Ok(values) => values.into_iter().for_each(|(name, value)| context.set_value(name, value)),
                Err(problem) => missing.add(format!("`values: {path}` {problem}")),
            },
            Values::Absent if !is_ok => {}
            Values::Absent => missing.add(format!("`values: {path}` is missing")),
            Values::Refused(why) => missing.add(format!("`values: {path}` {why}")),
        }
    }
    Ok(missing)
}

/// The file of the values.
enum Values {
    File(Vec<u8>),
    Absent,
    Refused(&'static str),
}

impl Staging<'_> {
    /// Collects the files of all wanted outputs.
    async fn files(&self, on_site: &OnSite, is_ok: bool, missing: &mut Missing) -> Result<(), Error> {
        let wanted = on_site.outputs.iter().filter(|output| match output.when {
            When::Always => true,
            When::Ok => is_ok,
            When::Error => !is_ok,
        });
        let wanted = wanted.map(|output| Ok((output, Pattern::new(&output.from)?)));
        let wanted: Vec<(&Output, Pattern)> = wanted.collect::<Result<_, Error>>()?;
        if wanted.is_empty() {
            return Ok(());
        }
        let found = self.list(|folder| wanted.iter().any(|(_, pattern)| pattern.may_match_below(folder))).await?;
        let in_sandbox = on_site.inputs.iter().filter(|input| input.to.scope == Scope::Task);
        let linked: Vec<&str> = in_sandbox.map(|input| input.to.path.trim_end_matches('/')).collect();
        let mut kept: BTreeMap<&BytePath, Found> = BTreeMap::new();
        let mut handing_over = Ok(());
        for (output, pattern) in &wanted {
            let matched = matched(output, pattern, &found, &linked, is_ok, missing);
            match output.to.scope {
                Scope::Store => kept.extend(matched),
                Scope::Client | Scope::Task | Scope::Session | Scope::Resource => {
                    // A failure here must not keep the other outputs from being collected.
                    match self.hand_over(output, &matched, missing).await {
                        Err(Error::Stage(text)) => missing.add(text),
                        Err(error) => handing_over = Err(error),
                        Ok(()) => {}
                    }
                }
            }
        }
        let objects = self.site.objects_to_keep().await?;
        let manifest = self.keep(&kept).await?;
        if !manifest.is_empty() || missing.reason().is_none() {
            let digest = objects.put_manifest(&manifest).await?;
            self.context.draft.borrow_mut().outcome.results = Some(digest);
        }
        handing_over
    }

    /// Reads the file of the values, up to a byte more than it may have.
    async fn values(&self, path: &str) -> Result<Values, Error> {
        let script = format!(
            "{}
             dir={}
             file=$dir/{}
             [ -e \"$file\" ] || [ -L \"$file\" ] || exit {ABSENT}
             inside \"$file\" \"$dir\" || exit {REFUSED}
             [ -f \"$file\" ] || exit {NO_FILE}
             [ -r \"$file\" ] || exit {UNREADABLE}
             head -c {} \"$file\"",
            guards(&self.visit.root),
            quote(self.dir),
            quote(path),
            values::BYTES_MAX + 1,
        );
        let output = self.visit.exec(&script).await?;
        Ok(match output.exit {
            Some(ABSENT) => Values::Absent,
            Some(REFUSED) => Values::Refused("leads out of its scope"),
            Some(NO_FILE) => Values::Refused("is not a file"),
            Some(UNREADABLE) => Values::Refused("is not readable"),
            _ => Values::File(output.ok()?),
        })
    }

    /// Puts files of the sandbox into a scope of the site, each under its path below the folder of the pattern.
    /// Idempotent: a moved file keeps its name in the sandbox as a hard link.
    async fn hand_over(
        &self,
        output: &Output,
        matched: &[(&BytePath, Found)],
        missing: &mut Missing,
    ) -> Result<(), Error> {
        let scope = self.scope(output.to.scope)?;
        let to = output.to.path.trim_end_matches('/');
        let is_named = matched.iter().any(|(path, _)| path.as_str() == Some(&output.from));
        let is_folder = to.len() < output.to.path.len() || to.is_empty() || !is_named;
        let base = base(&output.from);
        let mut triples = Vec::new();
        for (path, found) in matched {
            let path = path.as_bytes();
            let name = path.strip_prefix(base.as_bytes()).unwrap_or_else(|| path.get(base.len()..).unwrap_or_default());
            let target = if is_folder { [to.as_bytes(), b"/", name].concat() } else { to.as_bytes().to_vec() };
            let kind: &[u8] = if matches!(found, Found::Folder { .. }) { b"d" } else { b"f" };
            triples.extend([kind, b"\0", path, b"\0", &target, b"\0"].concat());
        }
        let act = match output.how {
            How::Move => "{ ln -fL \"$from\" \"$part\" 2>/dev/null || cp -fpT \"$from\" \"$part\"; }",
            How::Auto | How::Copy | How::Link | How::Unpack => "cp -fpT \"$from\" \"$part\"",
        };
        let script = format!(
            "{}
             dir={}; scope={}
             while [ $# -gt 2 ]; do
               kind=$1; name=$2; from=$dir/$2; to=$scope/$3; shift 3
               folder=${{to%/*}}; part=$folder/{}
               why=$(inside \"$folder\" \"$scope\" 2>&1) || {{ printf '%s: %s\\0' \"$name\" \"$why\"; continue; }}
               if [ $kind = d ]; then
                 [ ! -L \"$to\" ] || rm -f \"$to\"; folder=$to
               fi
               why=$(mkdir -p \"$folder\" 2>&1) || {{
                 case $why in *\"File exists\" | *\"Not a directory\") printf '%s: %s\\0' \"$name\" \"$why\"; continue ;; esac
                 echo \"$why\" >&2; exit 1
               }}
               [ $kind != d ] || continue
               if [ -d \"$to\" ]; then printf '%s: %s is a folder\\0' \"$name\" \"$to\"; continue; fi
               rm -f \"$part\" || exit 1
               {act} && mv -fT \"$part\" \"$to\" || {{ rm -f \"$part\"; exit 1; }}
             done",
            guards(&self.visit.root),
            quote(self.dir),
            quote(&scope),
            self.part(),
        );
        // In batches, so that even the longest names fit into a command line.
        let command =
            format!("umask 077; mkdir -p {} && xargs -0 -s 1000000 -n 192 sh -c {} sh", quote(&scope), quote(&script));
        let stdout = self.run(&command, &triples).await?;
        for refused in stdout.split(|byte| *byte == 0).filter(|refused| !refused.is_empty()) {
            missing.add(BytePath::from(refused.to_vec()).to_string());
        }
        Ok(())
    }

    /// Puts files of the sandbox into the object store; those that it already has are not fetched.
    async fn keep(&self, kept: &BTreeMap<&BytePath, Found>) -> Result<Manifest, Error> {
        let mut folders = Vec::new();
        let (mut large, mut small) = (Vec::new(), Vec::new());
        for (path, found) in kept {
            match found {
                Found::File { size, .. } if *size >= CACHED_FROM => large.push((*path, *size)),
                Found::File { size, .. } => small.push((*path, *size)),
                Found::Folder { .. } => folders.push((*path).clone()),
                Found::Refused(_) | Found::RefusedFolder(_) => {}
            }
        }
        let mut digests = self.digests(self.dir, small.iter().map(|(path, _)| *path)).await?;
        let objects = &self.site.objects;
        let known = &digests;
        let absent: BTreeMap<&BytePath, Digest> = futures_util::stream::iter(small)
            .map(|(path, size)| async move {
                let digest = *known.get(path).ok_or_else(|| vanished(path))?;
                Ok::<_, Error>((!objects.renew(digest, size).await?).then_some((path, digest)))
            })
            .buffered(OBJECTS_AT_ONCE)
            .try_filter_map(|absent| std::future::ready(Ok(absent)))
            .try_collect()
            .await?;
        self.keep_small(&absent).await?;
        self.name_large(&large).await?;
        for (idx, (path, size)) in large.into_iter().enumerate() {
            digests.insert(path.clone(), self.keep_large(idx, path, size).await?);
        }
        let mut entries = Vec::new();
        for (path, found) in kept {
            if let Found::File { size, executable } = found {
                let digest = *digests.get(*path).ok_or_else(|| vanished(path))?;
                entries.push(Entry { path: (*path).clone(), digest, size: *size, executable: *executable });
            }
        }
        let manifest = Manifest::with_folders(entries, folders)?;
        // A failure does no harm: nothing else uses the folder.
        let _ = std::fs::remove_dir_all(self.scratch_path());
        Ok(manifest)
    }

    /// Fetches small files as one stream and stores them as they arrive.
    async fn keep_small(&self, files: &BTreeMap<&BytePath, Digest>) -> Result<(), Error> {
        if files.is_empty() {
            return Ok(());
        }
        self.show(&format!("fetching {} files", files.len()));
        let names: Vec<u8> = files.keys().flat_map(|path| [b"./", path.as_bytes(), b"\0"].concat()).collect();
        let list = quote(&format!("{}/{}/fetch", self.dir, script::FOLDER));
        self.run(&format!("cat > {list}"), &names).await?;
        let (pieces, mut pieces_rx) = tokio::sync::mpsc::channel(STREAM_PIECES);
        let reader = StreamReader::new(futures_util::stream::poll_fn(move |context| {
            pieces_rx.poll_recv(context).map(|piece: Option<Bytes>| piece.map(Ok::<_, io::Error>))
        }));
        let (files_tx, mut files_rx) = tokio::sync::mpsc::channel::<(BytePath, Vec<u8>)>(OBJECTS_AT_ONCE);
        let runtime = self.context.facilities.blocking.clone();
        let unpacking = self.context.blocking(move || {
            let mut archive = tar::Archive::new(SyncIoBridge::new_with_handle(reader, runtime));
            for entry in archive.entries()? {
                let entry = entry?;
                // A name from the site is never used as a local path.
                let path = entry.path_bytes();
                let path = BytePath::from(path.strip_prefix(b"./").unwrap_or(&path).to_vec());
                let mut bytes = Vec::new();
                entry.take(CACHED_FROM).read_to_end(&mut bytes)?;
                if files_tx.blocking_send((path, bytes)).is_err() {
                    break;
                }
            }
            // The padding after the last file has to be read.
            io::copy(&mut archive.into_inner(), &mut io::sink())?;
            Ok::<_, io::Error>(())
        });
        let command =
            format!("cd {} && tar -chf - --hard-dereference --null --verbatim-files-from -T {list}", quote(self.dir));
        let receiving = self.visit.session.receive(&command, PollSender::new(pieces));
        let storing = futures_util::stream::poll_fn(move |context| files_rx.poll_recv(context))
            .map(|(path, bytes)| async move { Ok::<_, Error>((self.site.objects.put_bytes(bytes).await?, path)) })
            .buffer_unordered(OBJECTS_AT_ONCE)
            .try_filter(|(digest, path)| std::future::ready(files.get(path) == Some(digest)))
            .try_fold(0, |n_stored, _| std::future::ready(Ok(n_stored + 1)));
        let (unpacked, received, stored) = tokio::join!(unpacking, receiving, storing);
        let n_stored = stored?;
        let received = match received {
            // The unpacking failed; it has the cause.
            Err(error @ transport::Error::File { .. }) => {
                unpacked?.map_err(|error| Error::Files(error.to_string()))?;
                return Err(error.into());
            }
            received => received?,
        };
        // `tar` exits with 1 if a file changed or vanished while it was read.
        if received.exit == Some(1) {
            return Err(Error::Content(received.complaint()));
        }
        received.ok()?;
        unpacked?.map_err(|error| Error::Files(error.to_string()))?;
        if n_stored < files.len() {
            let text =
                format!("{} files arrived with another content, or are still being written", files.len() - n_stored);
            return Err(Error::Content(text));
        }
        Ok(())
    }

    /// Links large files under short plain names: a path need not be UTF-8, and it may be too long for a command.
    async fn name_large(&self, files: &[(&BytePath, u64)]) -> Result<(), Error> {
        if files.is_empty() {
            return Ok(());
        }
        let pair = |(idx, (path, _)): (usize, &(&BytePath, u64))| {
            [idx.to_string().as_bytes(), b"\0", path.as_bytes(), b"\0"].concat()
        };
        let pairs: Vec<u8> = files.iter().enumerate().flat_map(pair).collect();
        let folder = quote(&self.large());
        let script = "while [ $# -gt 1 ]; do ln -sfnT \"../../$2\" \"$1\" || exit 1; shift 2; done";
        let command = format!(
            "umask 077; mkdir -p {folder} && cd {folder} && xargs -0 -s 1000000 -n 128 sh -c {} sh",
            quote(script)
        );
        self.run(&command, &pairs).await.map(drop)
    }

    fn large(&self) -> String {
        format!("{}/{}/large", self.dir, script::FOLDER)
    }

    /// Stores a large file. The transfer starts, or resumes, while the site computes the digest, and stops if the object
    /// store has the file.
    async fn keep_large(&self, idx: usize, path: &BytePath, size: u64) -> Result<Digest, Error> {
        let (session, objects) = (&self.visit.session, &self.site.objects);
        let there = format!("{}/{idx}", self.large());
        let here = self.scratch()?.join(Digest::of(path.as_bytes()).to_string());
        let progress = self.telling(|mib| format!("fetched {mib} of {} MiB of {path}", size >> 20));
        let is_known = async |digest| Ok::<_, Error>(objects.renew(digest, size).await?);
        let fetched = session.get_unless(&there, size, &here, &progress, is_known).await;
        let (digest, came) = fetched.map_err(|error| match error {
            Error::Files(text) => Error::Files(text.replace(&there, &path.to_string())),
            Error::Lacks(text) => Error::Lacks(text.replace(&there, &path.to_string())),
            error @ (Error::Site(_) | Error::Wait(_) | Error::Content(_) | Error::Here { .. } | Error::Stage(_)) => {
                error
            }
        })?;
        let Some(came) = came else { return Ok(digest) };
        if came != digest || std::fs::metadata(&here).map(|meta| meta.len()).ok() != Some(size) {
            let _ = std::fs::remove_file(&here);
            let text = format!("{path} arrived with another content, or is still being written");
            return Err(Error::Content(text));
        }
        objects.take_file(&here, digest, size).await?;
        Ok(digest)
    }
}

/// The error for a file that was listed but is gone; the sandbox is listed again.
fn vanished(path: &BytePath) -> Error {
    Error::Content(format!("{path} has vanished, or cannot be read"))
}
