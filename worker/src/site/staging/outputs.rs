//! What comes back after a job.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::sync::Arc;

use baton_common::digest::Digest;
use baton_common::objects::{Entry, Manifest};
use baton_common::spec::on_site::{self, How, OnSite, Output, Scope, When};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use globset::GlobMatcher;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tokio_util::sync::PollSender;

use super::{CACHED_FROM, Error, Staging, VERIFY_LIMIT, guards};
use crate::process::Context;
use crate::site::{Site, Visit, script};
use crate::transport::{self, quote};

/// Pieces of the stream that brings small files, of some 32 KiB each.
const STREAM_PIECES: usize = 16;

/// Objects that are asked for or put at a time: an answer, or a disk, takes longer than the work.
const OBJECTS_AT_ONCE: usize = 16;

/// Most bytes of the file that becomes values.
const VALUES_MAX: usize = 64 * 1024;

/// The exit of a script whose file is not there.
const ABSENT: i32 = 44;

/// The exit of a script whose file is not in the sandbox.
const REFUSED: i32 = 45;

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
        let objects = site.objects_to_keep().await?;
        let kept: Vec<(&str, &Found)> = kept.into_iter().map(|path| (path, &found[path])).collect();
        let manifest = staging.keep(&kept).await?;
        let digest = objects.put_manifest(&manifest).await?;
        context.draft.borrow_mut().outcome.results = Some(digest);
    }
    if let Some(path) = &on_site.values {
        match staging.values(path).await? {
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
    /// The content of the file of the values; `None` if it is not there.
    async fn values(&self, path: &str) -> Result<Option<Vec<u8>>, Error> {
        let script = format!(
            "{}
             dir={}
             file=$dir/{}
             [ -e \"$file\" ] || exit {ABSENT}
             inside \"$file\" \"$dir\" || exit {REFUSED}
             cat \"$file\"",
            guards(&self.visit.root),
            quote(self.dir),
            quote(path)
        );
        let output = self.visit.exec(&script).await?;
        match output.exit {
            Some(ABSENT) => Ok(None),
            Some(REFUSED) => Err(Error::Stage(format!("output: `values: {path}` leads out of its scope"))),
            _ => Ok(output.ok().map(Some)?),
        }
    }

    /// Every file of the sandbox, but for Baton's own; a link that leads out of it is none of them.
    async fn list(&self) -> Result<BTreeMap<String, Found>, Error> {
        let of_links = quote(
            r#"dir=$1; shift
             for link; do
               target=$(readlink -f "$link") || continue
               case $target in
                 "$dir"/.baton/*) ;;
                 "$dir"/*) [ ! -f "$target" ] || printf '%s 600 %s\0' "$(wc -c < "$target")" "${link#./}" ;;
               esac
             done"#,
        );
        let script = format!(
            "cd {} || exit 1
             find . -path ./.baton -prune -o -type f -printf '%s %m %P\\0'
             find . -path ./.baton -prune -o -type l -exec sh -c {of_links} sh \"$(pwd -P)\" {{}} +",
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
            How::Move => "{ ln -fL \"$from\" \"$part\" 2>/dev/null || cp -fpT \"$from\" \"$part\"; }",
            How::Auto | How::Copy | How::Link | How::Unpack => "cp -fpT \"$from\" \"$part\"",
        };
        let script = format!(
            "{}
             dir={}; scope={}
             while [ $# -gt 1 ]; do
               from=$dir/$1; to=$scope/$2; shift 2
               folder=${{to%/*}}; part=$folder/{}
               inside \"$folder\" \"$scope\" || exit 255
               mkdir -p \"$folder\" && rm -f \"$part\" || exit 1
               {act} && mv -fT \"$part\" \"$to\" || {{ rm -f \"$part\"; exit 1; }}
             done",
            guards(&self.visit.root),
            quote(self.dir),
            quote(&scope),
            self.part(),
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
