//! A virtual host belongs to one database: tasks name rows, and requests to all mean every row.
//!
//! The queue `baton.database`, which never has a message, says to which one. Its dead-letter routing key is the identity of the
//! database, and a broker refuses to declare a queue that is there with another one. So the first program of a fleet takes the
//! virtual host, and a program of another fleet is told so, without a race and without any right but that to declare.

use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection};
use tokio::time::timeout;
use tracing::debug;
use uuid::Uuid;

use super::CheckError;
use super::envelope::short;
use super::link::{ANSWER_LIMIT, close, is_other_kind, masked, parse, reason};

/// The queue that says to which database a virtual host belongs.
pub(super) const DATABASE_QUEUE: &str = "baton.database";

/// Takes the virtual host of a connection for a database, or finds that this has been done. A connection to that of another
/// database is closed.
///
/// Where the broker does not let this user declare queues, or does not answer, nothing is known; then the connection is used,
/// as those who only publish need no more rights than that.
///
/// # Errors
/// [`CheckError::OtherDatabase`].
pub(super) async fn take(connection: &Connection, url: &str, database: Uuid) -> Result<(), CheckError> {
    let declaring = async {
        let channel = connection.create_channel().await?;
        declare(&channel, database).await?;
        channel.close(200, "OK".into()).await
    };
    match timeout(ANSWER_LIMIT, declaring).await {
        Ok(Err(error)) if is_other_kind(&error) => {
            close(connection).await;
            let uri = parse(url)?;
            Err(CheckError::OtherDatabase { url: masked(&uri), vhost: uri.vhost })
        }
        Ok(Err(error)) => {
            debug!(error = reason(&error), "to which database the virtual host belongs is not known");
            Ok(())
        }
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

async fn declare(channel: &Channel, database: Uuid) -> lapin::Result<()> {
    let mut arguments = FieldTable::default();
    let text = |text: String| AMQPValue::LongString(text.into());
    arguments.insert("x-queue-type".into(), text("quorum".to_owned()));
    // A routing key needs an exchange. Nothing is ever dead-lettered by a queue that is never published to.
    arguments.insert("x-dead-letter-exchange".into(), text(String::new()));
    arguments.insert("x-dead-letter-routing-key".into(), text(database.to_string()));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(short(DATABASE_QUEUE), options, arguments).await.map(drop)
}
