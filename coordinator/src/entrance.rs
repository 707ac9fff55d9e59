//! Where connections come in: how many there may be, who has shown what, and who has to go.
//!
//! Whoever comes is a stranger until he has shown a certificate that is accepted, or a token with a request. Strangers are few: the
//! oldest gives way to the next, and none stays long. Fewer still are those who have got as far as to HTTP/2, which takes memory.
//! Where nobody is asked who he is, a request makes a guest, who may stay and say more, but gives way like a stranger until he has
//! joined the run. So connections that say nothing, or nonsense, or take no answer hold little memory, and keep nobody out.

use crate::access::{self, Standing, Tls};
use crate::lock;
use crate::rate::{Bucket, Complaints, Rate};
use crate::turns::Turns;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Sleep, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::metadata::MetadataMap;
use tonic::transport::server::Connected;
use tonic::{Request, Status};
use unisono_proto::identity::{Identity, IdentityError, Role};
use unisono_proto::tls::{self, Wire};

/// Connections at once, at most: two or three of each of some thousand workers.
const MOST: usize = 8192;
/// Of them, those of strangers and guests.
const STRANGERS: usize = 1024;
/// Of these, those which speak HTTP/2, each of which takes about 50 to 150 KiB: of strangers, and of guests.
const SPEAKING: usize = 64;
const GUESTS: usize = 256;
/// Those who come while others, who give way to them, have not gone yet.
const LEAVING: usize = 128;
/// A stranger's time, from the first byte to a request that is admitted.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that are read from a stranger or a guest: its requests are short.
const FIRST_BYTES: usize = 64 << 10;
/// How often a guest is sent the job: the answers wait until it takes them.
const JOBS: usize = 4;
/// So long the other side may take nothing of what is written.
pub const STALL: Duration = Duration::from_secs(30);
/// New connections of one address: so many at once, and so many a second after them.
const CONNECTIONS: Rate = Rate { burst: 4000.0, each_second: 100.0 };
/// Requests on one connection; a worker that is sent its data asks for each partition.
const REQUESTS: Rate = Rate { burst: 10_000.0, each_second: 1000.0 };
/// Addresses whose rates are remembered.
const ADDRESSES: usize = 4096;

/// Some, by the numbers in whose order they came, whenever they got here: where there are too many, the oldest gives way.
struct Queue {
    most: usize,
    all: Mutex<BTreeMap<u64, CancellationToken>>,
}

impl Queue {
    fn new(most: usize) -> Queue {
        Queue { most, all: Mutex::default() }
    }

    fn enter(&self, id: u64, gone: &CancellationToken) {
        let mut all = lock(&self.all);
        all.insert(id, gone.clone());
        if all.len() > self.most
            && let Some((_, oldest)) = all.pop_first()
        {
            oldest.cancel();
        }
    }

    fn leave(&self, id: u64) {
        lock(&self.all).remove(&id);
    }
}

/// What all connections share.
struct Hall {
    tls: Option<Tls>,
    count: AtomicUsize,
    next: AtomicU64,
    /// Who has not said anything, who speaks, and who was admitted as anybody is.
    silent: Queue,
    speaking: Queue,
    guests: Queue,
    /// A place is free when the memory of who had it is: of all strangers and guests, and of those which speak.
    arrivals: Arc<Semaphore>,
    places: Arc<Semaphore>,
    /// Who may send more.
    allowed: Mutex<Weak<Known>>,
    addresses: Mutex<HashMap<IpAddr, Bucket>>,
    /// About those who ask for what they may not.
    refusals: Complaints,
    /// About connections.
    complaints: Complaints,
}

impl Hall {
    /// Whether an address opens connections too fast.
    fn is_hasty(&self, address: IpAddr) -> bool {
        let (mut all, now) = (lock(&self.addresses), Instant::now());
        if all.len() >= ADDRESSES && !all.contains_key(&address) {
            all.retain(|_, bucket| !bucket.is_full(CONNECTIONS, now));
            if all.len() >= ADDRESSES {
                return true;
            }
        }
        !all.entry(address).or_insert_with(|| Bucket::new(CONNECTIONS, now)).take(CONNECTIONS, now)
    }

    /// Lets somebody in.
    fn enter(self: &Arc<Self>, address: SocketAddr) -> Pass {
        self.count.fetch_add(1, Ordering::Relaxed);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        Pass { hall: self.clone(), id, address, gone: CancellationToken::new() }
    }
}

/// A place in the hall, as long as its connection.
struct Pass {
    hall: Arc<Hall>,
    id: u64,
    address: SocketAddr,
    /// That it has to go.
    gone: CancellationToken,
}

impl Pass {
    fn complain(&self, why: &str) {
        self.hall.complaints.say(self.address, why);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let Hall { silent, speaking, guests, .. } = &*self.hall;
        [silent, speaking, guests].iter().for_each(|queue| queue.leave(self.id));
        self.hall.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// None of its requests was admitted; one was, as anybody's would be; it is known to be one that may be here.
const STRANGER: u8 = 0;
const GUEST: u8 = 1;
const KNOWN: u8 = 2;

/// Who is at the other end of a connection; what a request's extensions hold.
#[derive(Clone)]
pub struct Peer(Arc<Known>);

struct Known {
    pass: Pass,
    standing: Standing,
    /// [`STRANGER`], [`GUEST`] or [`KNOWN`].
    trust: AtomicU8,
    /// What it holds until it is known.
    places: Mutex<Vec<OwnedSemaphorePermit>>,
    /// How much on it belongs to members.
    members: Mutex<usize>,
    /// Bytes that are still read from it while it is not known. A whole frame is kept before anybody looks at it, and a frame may be
    /// long.
    left: AtomicUsize,
    /// How often it was sent the job.
    jobs: AtomicUsize,
    requests: Mutex<Bucket>,
}

impl Peer {
    /// Whose request this is.
    pub fn of<T>(request: &Request<T>) -> Result<&Peer, Status> {
        request.extensions().get().ok_or_else(|| Status::internal("a request of nobody"))
    }

    /// Whether there are not too many requests.
    fn count(&self) -> Result<(), Status> {
        if lock(&self.0.requests).take(REQUESTS, Instant::now()) {
            return Ok(());
        }
        Err(Status::resource_exhausted("there are too many requests on this connection: wait between them"))
    }

    /// It has shown that it belongs to a member of the run, and does as long as what this gives.
    pub fn belongs(self) -> Belongs {
        let mut members = lock(&self.0.members);
        *members += 1;
        self.trust(KNOWN);
        drop(members);
        Belongs(self)
    }

    fn trust(&self, now: u8) {
        let Known { pass, trust, places, .. } = &*self.0;
        let hall = &pass.hall;
        match (trust.fetch_max(now, Ordering::Relaxed), now) {
            (STRANGER, GUEST) => {
                hall.speaking.leave(pass.id);
                hall.guests.enter(pass.id, &pass.gone);
            }
            (STRANGER | GUEST, KNOWN) => {
                [&hall.speaking, &hall.guests].iter().for_each(|queue| queue.leave(pass.id));
                lock(places).clear();
            }
            _ => {}
        }
    }

    /// Whether it may be sent the job once more.
    pub fn take_job(&self) -> Result<(), Status> {
        let Known { trust, jobs, .. } = &*self.0;
        if jobs.fetch_add(1, Ordering::Relaxed) < JOBS || trust.load(Ordering::Relaxed) == KNOWN {
            return Ok(());
        }
        Err(Status::resource_exhausted(format!(
            "this connection was sent the job {JOBS} times: join the run, or open another"
        )))
    }

    /// Lets it send so many bytes more: one at a time, so that whoever was let before is not any more.
    pub fn allow(&self, bytes: u64) {
        let mut allowed = lock(&self.0.pass.hall.allowed);
        if let Some(before) = allowed.upgrade() {
            before.left.store(FIRST_BYTES, Ordering::Relaxed);
        }
        self.0.left.store(FIRST_BYTES + bytes as usize, Ordering::Relaxed);
        *allowed = Arc::downgrade(&self.0);
    }

    /// [`admit`], of this peer; the log has its address, where it may not.
    fn admit(&self, metadata: &MetadataMap, role: Option<Role>) -> Result<(), Status> {
        let Known { pass, standing, .. } = &*self.0;
        let token = pass.hall.tls.as_ref().and_then(|tls| tls.token.as_ref());
        let checked = self.count().and_then(|()| access::check(standing, token, metadata, role));
        match &checked {
            Ok(()) => self.trust(if *standing == Standing::Anybody { GUEST } else { KNOWN }),
            Err(refused) => pass.hall.refusals.say(pass.address, refused.message()),
        }
        checked
    }
}

/// A connection's belonging to a member. When that is over it is a guest's again, where anybody may be one.
pub struct Belongs(Peer);

impl Drop for Belongs {
    fn drop(&mut self) {
        let Known { pass, standing, trust, members, .. } = &*self.0.0;
        let mut members = lock(members);
        *members -= 1;
        if *members == 0 && *standing == Standing::Anybody {
            trust.store(GUEST, Ordering::Relaxed);
            pass.hall.guests.enter(pass.id, &pass.gone);
        }
    }
}

/// Counts a request of what anybody may ask.
pub fn counts(request: Request<()>) -> Result<Request<()>, Status> {
    Peer::of(&request)?.count().map(|()| request)
}

/// Asks for a role before a service sees a request.
pub fn asks(role: Option<Role>) -> impl Fn(Request<()>) -> Result<Request<()>, Status> + Clone {
    move |request| admit(&request, role).map(|()| request)
}

/// Whether a request's peer may do what needs `role` (`None`: what anybody may who is let in).
///
/// # Errors
/// Why not.
pub fn admit<T>(request: &Request<T>, role: Option<Role>) -> Result<(), Status> {
    Peer::of(request)?.admit(request.metadata(), role)
}

/// One connection.
pub struct Connection {
    wire: Turns<Box<dyn Wire>>,
    peer: Peer,
    stranger: Option<Stranger>,
    /// Ends when nothing that was written has left for long.
    stalled: Option<Pin<Box<Sleep>>>,
}

/// A connection of somebody who is not known yet.
struct Stranger {
    /// That it has to go.
    gone: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Its time, until a request is admitted.
    patience: Pin<Box<Sleep>>,
}

impl Connection {
    /// Whether it may go on. Who is not known is asked about it at each turn: one who takes no answers is never read from.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(stranger) = &mut self.stranger else { return Ok(()) };
        let Known { trust, left, pass, standing, .. } = &*self.peer.0;
        let why = if trust.load(Ordering::Relaxed) == KNOWN {
            if *standing != Standing::Anybody {
                self.stranger = None;
            }
            return Ok(());
        } else if left.load(Ordering::Relaxed) == 0 {
            "it has sent 64 KiB, and is not known yet"
        } else if stranger.gone.as_mut().poll(cx).is_ready() {
            "others came, and it is not known yet"
        } else if trust.load(Ordering::Relaxed) == STRANGER && stranger.patience.as_mut().poll(cx).is_ready() {
            "its 10 s were over, and it is not known yet"
        } else {
            return Ok(());
        };
        pass.complain(why);
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Does a part of the writing, unless it has to go, or the other side takes nothing for long.
    fn write<T>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        part: impl FnOnce(Pin<&mut Turns<Box<dyn Wire>>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let this = self.get_mut();
        this.check(cx)?;
        let written = part(Pin::new(&mut this.wire), cx);
        if written.is_ready() {
            this.stalled = None;
        } else if this.stalled.get_or_insert_with(|| Box::pin(sleep(STALL))).as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        written
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.check(cx)?;
        let before = buf.filled().len();
        let read = Pin::new(&mut this.wire).poll_read(cx, buf);
        if this.stranger.is_some() && this.peer.0.trust.load(Ordering::Relaxed) != KNOWN {
            let (left, came) = (&this.peer.0.left, buf.filled().len() - before);
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(came))).ok();
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, |wire, cx| wire.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, |wire, cx| wire.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |wire, cx| wire.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |wire, cx| wire.poll_shutdown(cx))
    }
}

/// Where a coordinator listens, and whether by TLS.
pub struct Entrance {
    listener: TcpListener,
    tls: Option<Tls>,
}

impl Entrance {
    /// With an identity, by TLS and for those whom its authority knows; without, for anybody.
    ///
    /// # Errors
    /// An identity that a coordinator cannot use.
    pub fn new(listener: TcpListener, identity: Option<&Identity>) -> Result<Entrance, IdentityError> {
        // Its connections have it from their beginning.
        unisono_proto::steady(&listener).ok();
        // So many may come at once: those for whom the system has no room try again after a second, and after three.
        rustix::net::listen(&listener, MOST as i32).ok();
        Ok(Entrance { listener, tls: identity.map(Tls::new).transpose()? })
    }

    /// Whether all that comes and goes is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// The connections, for as long as somebody takes them.
    pub(crate) fn open(self) -> ReceiverStream<io::Result<Connection>> {
        let (send, receive) = mpsc::channel(16);
        let hall = Arc::new(Hall {
            tls: self.tls,
            count: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            silent: Queue::new(STRANGERS - SPEAKING - GUESTS),
            speaking: Queue::new(SPEAKING),
            guests: Queue::new(GUESTS),
            arrivals: Arc::new(Semaphore::new(STRANGERS + LEAVING)),
            places: Arc::new(Semaphore::new(SPEAKING + GUESTS)),
            allowed: Mutex::default(),
            addresses: Mutex::default(),
            refusals: Complaints::new(),
            complaints: Complaints::new(),
        });
        tokio::spawn(accept(self.listener, hall, send));
        ReceiverStream::new(receive)
    }
}

async fn accept(listener: TcpListener, hall: Arc<Hall>, send: mpsc::Sender<io::Result<Connection>>) {
    let next = async || {
        let arrival = hall.arrivals.clone().acquire_owned().await.map_err(io::Error::other)?;
        listener.accept().await.map(|(stream, address)| (stream, address, arrival))
    };
    loop {
        let (stream, address, arrival) = tokio::select! {
            next = next() => match next {
                Ok(next) => next,
                // Its peer has gone, or there are too many open files: those that are there go on.
                Err(e) => {
                    tracing::debug!("a connection was not accepted: {e}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
            () = send.closed() => return,
        };
        if hall.count.load(Ordering::Relaxed) >= MOST {
            hall.complaints.say(address, "there are too many connections");
        } else if hall.is_hasty(address.ip().to_canonical()) {
            hall.complaints.say(address, "it opens connections too fast");
        } else {
            let pass = hall.enter(address);
            hall.silent.enter(pass.id, &pass.gone);
            tokio::spawn(welcome(stream, pass, arrival, send.clone()));
        }
    }
}

/// What HTTP/2 begins with (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Why TLS came to nothing.
fn unshaken(e: &io::Error) -> String {
    use rustls::AlertDescription::{BadCertificate, CertificateExpired, CertificateUnknown, UnknownCA};
    match e.get_ref().and_then(|e| e.downcast_ref()) {
        Some(rustls::Error::AlertReceived(BadCertificate | CertificateExpired | CertificateUnknown | UnknownCA)) => {
            "it does not accept this coordinator's certificate, for a reason that it tells itself".into()
        }
        Some(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)) => {
            "it speaks no TLS; its URL has to begin with https://".into()
        }
        _ => e.to_string(),
    }
}

/// Waits for the first words of a connection, which are TLS's handshake or HTTP/2's preface. `None` where nobody is there any more.
///
/// # Errors
/// Why it is sent away.
async fn hear(stream: TcpStream, ours: Option<&Tls>) -> Result<Option<(Box<dyn Wire>, Standing)>, String> {
    let Some(ours) = ours else {
        let (mut first, mut pause) = ([0; PREFACE.len()], Duration::from_millis(1));
        loop {
            match stream.peek(&mut first).await {
                Ok(0) | Err(_) => return Ok(None),
                Ok(n) if first[..n] != PREFACE[..n] => return Err("it does not speak HTTP/2 without TLS".into()),
                Ok(n) if n == PREFACE.len() => return Ok(Some((Box::new(stream), Standing::Anybody))),
                // What is there stays there: nothing tells when more comes.
                Ok(_) => tokio::time::sleep(pause).await,
            }
            pause *= 2;
        }
    };
    let shaken = tls::accept(ours.config.clone(), stream).await;
    let stream = shaken.map_err(|e| format!("the TLS handshake failed: {}", unshaken(&e)))?;
    let standing = ours.standing(stream.peer_certificates());
    Ok(Some((Box::new(stream), standing)))
}

/// Passes a connection on when it has said who it is, or has got a place among those who have not; sends it away when its time is
/// over.
async fn welcome(
    stream: TcpStream,
    pass: Pass,
    arrival: OwnedSemaphorePermit,
    send: mpsc::Sender<io::Result<Connection>>,
) {
    let end = tokio::time::Instant::now() + PATIENCE;
    stream.set_nodelay(true).ok();
    let (hall, gone) = (pass.hall.clone(), pass.gone.clone());
    let heard = tokio::select! {
        heard = tokio::time::timeout_at(end, hear(stream, hall.tls.as_ref())) => heard,
        () = gone.cancelled() => return pass.complain("others came, and it had said nothing"),
    };
    let (wire, standing) = match heard {
        Ok(Ok(Some(heard))) => heard,
        Ok(Ok(None)) => return,
        Ok(Err(why)) => return pass.complain(&why),
        Err(_) => return pass.complain("it has said nothing for 10 s"),
    };
    hall.silent.leave(pass.id);
    let mut places = Vec::new();
    if !matches!(&standing, Standing::Known(roles) if !roles.is_empty()) {
        hall.speaking.enter(pass.id, &pass.gone);
        // Who gives way to it takes a moment.
        let place = tokio::select! {
            place = hall.places.clone().acquire_owned() => place,
            () = gone.cancelled() => return pass.complain("others came while it waited"),
            () = tokio::time::sleep_until(end) => return pass.complain("there was no place for it within 10 s"),
        };
        // One with a certificate needs neither.
        places.extend([Ok(arrival), place].into_iter().flatten());
    }
    let (gone, patience) = (Box::pin(gone.cancelled_owned()), Box::pin(tokio::time::sleep_until(end)));
    let stranger = Some(Stranger { gone, patience });
    let peer = Peer(Arc::new(Known {
        pass,
        standing,
        trust: AtomicU8::new(STRANGER),
        places: Mutex::new(places),
        members: Mutex::new(0),
        left: AtomicUsize::new(FIRST_BYTES),
        jobs: AtomicUsize::new(0),
        requests: Mutex::new(Bucket::new(REQUESTS, Instant::now())),
    }));
    // Where nobody takes it any more, the run is over.
    send.send(Ok(Connection { wire: Turns::new(wire), peer, stranger, stalled: None })).await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that came before others, and is heard after them, does not push out the newest.
    #[test]
    fn the_oldest_gives_way_whenever_it_got_there() {
        let (queue, gone) = (Queue::new(2), [(); 5].map(|()| CancellationToken::new()));
        let are_gone = || [0, 1, 2, 3, 4].map(|id: usize| gone[id].is_cancelled());
        [4, 1, 2].into_iter().for_each(|id| queue.enter(id, &gone[id as usize]));
        assert_eq!(are_gone(), [false, true, false, false, false]);
        queue.enter(0, &gone[0]);
        assert_eq!(are_gone(), [true, true, false, false, false]);
        queue.leave(2);
        queue.enter(3, &gone[3]);
        assert_eq!(are_gone(), [true, true, false, false, false]);
    }

    #[test]
    fn a_rate_has_a_burst_and_fills_again() {
        let rate = Rate { burst: 3.0, each_second: 2.0 };
        let start = Instant::now();
        let mut bucket = Bucket::new(rate, start);
        let mut take = |ms| bucket.take(rate, start + Duration::from_millis(ms));
        assert_eq!([take(0), take(0), take(0), take(0), take(400)], [true, true, true, false, false]);
        assert_eq!([take(500), take(500), take(1000)], [true, false, true]);
        assert_eq!([take(60_000), take(60_000), take(60_000), take(60_000)], [true, true, true, false]);
    }
}
