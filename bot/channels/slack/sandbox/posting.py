"""Posting, changing and deleting messages, for apps and people alike: the channel changes, then the event goes out."""

from bot.channels.slack.sandbox.agents import AgentSurface
from bot.channels.slack.sandbox.events import Events
from bot.channels.slack.sandbox.messages import Message, Messages, Piece, Stream, StreamState
from bot.channels.slack.sandbox.world import Channel, Installation, Json, User, World


class Posting:
    def __init__(self, world: World, messages: Messages, events: Events, agents: AgentSurface) -> None:
        self._world = world
        self._messages = messages
        self._events = events
        self._agents = agents

    def post(
        self,
        channel: Channel,
        author: User,
        text: str,
        *,
        blocks: list[Json] | None = None,
        thread_ts: str | None = None,
        app: Installation | None = None,
        metadata: Json | None = None,
        client_msg_id: str | None = None,
        username: str | None = None,
        only_for: str | None = None,
        stream: Stream | None = None,
    ) -> Message:
        """One that is only for one person makes no event."""
        message = Message(
            ts=self._world.new_ts(),
            channel=channel,
            author=author,
            text=text,
            posted_at=self._world.clock.now(),
            blocks=blocks or [],
            thread_ts=thread_ts,
            app=app,
            metadata=metadata,
            client_msg_id=client_msg_id,
            username=username,
            only_for=only_for,
            stream=stream,
        )
        self._messages.add(message)
        if only_for is None:
            if app is not None and thread_ts is not None:
                self._agents.answered(channel.id, thread_ts)
            self._events.message_posted(message)
        self._world.changes.notify()
        return message

    def change(self, message: Message, text: str, blocks: list[Json]) -> None:
        now = self._world.clock.now()
        previous = message.record(now)
        message.change(text, blocks, now)
        message.edited_ts = self._world.new_ts()
        self._changed(message, previous)

    def add_to_stream(self, message: Message, stream: Stream, piece: Piece) -> None:
        """Text that grows is no edit, and makes no event before the stream is stopped."""
        stream.pieces.append(piece)
        message.text += piece.text
        self._world.changes.notify()

    def stop_stream(self, message: Message, stream: Stream, blocks: list[Json], metadata: Json | None) -> None:
        previous = message.record(self._world.clock.now())
        stream.state = StreamState.STOPPED
        message.blocks = blocks
        message.metadata = metadata or message.metadata
        self._changed(message, previous)

    def delete(self, message: Message) -> None:
        message.is_deleted = True
        if message.only_for is None:
            self._events.message_deleted(message)
        self._world.changes.notify()

    def react(self, message: Message, user_id: str, name: str) -> bool:
        """False when the person has reacted so already."""
        users = message.reactions.setdefault(name, [])
        if user_id in users:
            return False
        users.append(user_id)
        self._events.reaction("reaction_added", message, user_id, name)
        self._world.changes.notify()
        return True

    def take_reaction_back(self, message: Message, user_id: str, name: str) -> bool:
        """False when there is no such reaction."""
        users = message.reactions.get(name, [])
        if user_id not in users:
            return False
        users.remove(user_id)
        if not users:
            del message.reactions[name]
        self._events.reaction("reaction_removed", message, user_id, name)
        self._world.changes.notify()
        return True

    def _changed(self, message: Message, previous: Json) -> None:
        if message.only_for is None:
            self._events.message_changed(message, previous)
        self._world.changes.notify()
