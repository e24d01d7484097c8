// Conversations and settings, kept in this browser alone.

const PLACE = "dllama_mpi";

function load() {
  try {
    return JSON.parse(localStorage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}

const kept = { conversations: [], current: null, settings: {}, theme: "", ...load() };

export function save() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(kept));
  } catch {
    if (kept.conversations.length > 1) {
      kept.conversations.pop(); // no room: the oldest goes
      save();
    }
  }
}

export const store = kept;

export function current() {
  return kept.conversations.find((each) => each.id === kept.current) ?? begin();
}

export function begin() {
  const empty = kept.conversations.find((each) => !each.messages.length);
  const found = empty ?? { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "", messages: [] };
  if (!empty) kept.conversations.unshift(found);
  kept.current = found.id;
  save();
  return found;
}

export function remove(id) {
  kept.conversations = kept.conversations.filter((each) => each.id !== id);
  if (kept.current === id) kept.current = kept.conversations[0]?.id ?? null;
  save();
}
