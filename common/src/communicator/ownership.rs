//! Binds a virtual host to one database, since tasks name rows, and a request to all processes means every row.
//!
//! The queue `baton.database`, which never has a message, names the database: its dead-letter routing key is the
//! identity of the database, and a broker refuses to declare an existing queue with another key. So the first program
//! of a fleet takes the virtual host, and a program of another fleet gets an error. This has no race, and needs only
//! the permission to declare queues.

use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection};
use tokio::time::timeout;
use tracing::debug;
use uuid::Uuid;

use super::CheckError;
use super::envelope::short;
use super::link::{ANSWER_LIMIT, close, is_other_kind, masked, parse, reason};

/// The queue that names the database of a virtual host.
pub(super) const DATABASE_QUEUE: &str = "baton.database";

/// Binds the virtual host of a connection to a database, or verifies that it is bound to it. Closes a connection to the
/// virtual host of another database.
///
/// If the user may not declare queues, or the broker does not answer, the owner is unknown and the connection is used:
/// a program that only publishes needs no other permission.
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
            debug!(error = reason(&error), "the database of the virtual host is unknown");
            Ok(())
        }
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

async fn declare(channel: &Channel, database: Uuid) -> lapin::Result<()> {
    let mut arguments = FieldTable::default();
    let text = |text: String| AMQPValue::LongString(text.into());
    arguments.insert("x-queue-type".into(), text("quorum".to_owned()));
    // A dead-letter routing key requires an exchange. The queue never has a message to dead-letter.
    arguments.insert("x-dead-letter-exchange".into(), text(String::new()));
    arguments.insert("x-dead-letter-routing-key".into(), text(database.to_string()));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(short(DATABASE_QUEUE), options, arguments).await.map(drop)
}
