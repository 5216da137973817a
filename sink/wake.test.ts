import { setImmediate as turnOfTheLoop } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import { Wake } from './wake.js'

/** A worker that waits once: awake or not. */
function sleeper(wake: Wake) {
  const worker = { awake: false }
  void wake.wait().then(() => {
    worker.awake = true
  })
  return worker
}

const settled = async <T>(value: T): Promise<T> => {
  await turnOfTheLoop()
  return value
}

const quiet = (partitions = 4) => {
  const wake = new Wake(partitions)
  wake.take()
  return wake
}

describe('hints', () => {
  test('are_of_all_partitions_at_first', () => {
    expect([...new Wake(4).take()]).toEqual([0, 1, 2, 3])
  })

  test('are_gone_once_taken', () => {
    const wake = quiet()
    wake.hint([2])
    expect([...wake.take()]).toEqual([2])
    expect([...wake.take()]).toEqual([])
  })

  test('are_each_there_once_however_often_they_come', () => {
    const wake = quiet()
    wake.hint([3, 1])
    wake.hint([1])
    wake.hint([3, 3])
    expect([...wake.take()].sort()).toEqual([1, 3])
  })

  test('that_come_after_taking_stay_for_the_next_one', () => {
    const wake = quiet()
    wake.hint([1])
    const taken = wake.take()
    wake.hint([2])
    expect([[...taken], [...wake.take()]]).toEqual([[1], [2]])
  })
})

describe('wait', () => {
  test('resolves_at_once_while_there_are_hints', async () => {
    expect(await settled(sleeper(new Wake(1)))).toEqual({ awake: true })
  })

  test('sleeps_while_there_are_none_and_wakes_when_one_comes', async () => {
    const wake = quiet()
    const worker = sleeper(wake)
    expect(await settled(worker)).toEqual({ awake: false })
    wake.hint([])
    expect(await settled(worker)).toEqual({ awake: false })
    wake.hint([0])
    expect(await settled(worker)).toEqual({ awake: true })
  })

  test('wakes_one_worker_for_each_piece_of_news_the_longest_asleep_first', async () => {
    const wake = quiet()
    const workers = [sleeper(wake), sleeper(wake), sleeper(wake)]
    wake.hint([0, 1])
    expect(await settled(workers)).toEqual([{ awake: true }, { awake: false }, { awake: false }])
    wake.hint([1])
    expect(await settled(workers)).toEqual([{ awake: true }, { awake: true }, { awake: false }])
  })

  test('a_sleeper_is_woken_though_the_hints_of_before_have_not_been_taken', async () => {
    const wake = quiet()
    const first = sleeper(wake)
    const second = sleeper(wake)
    wake.hint([0])
    wake.hint([0]) // nothing new, but there may be more than one worker can carry
    expect(await settled([first, second])).toEqual([{ awake: true }, { awake: true }])
  })

  test('ring_wakes_all_without_news', async () => {
    const wake = quiet()
    const workers = [sleeper(wake), sleeper(wake)]
    wake.ring()
    expect(await settled(workers)).toEqual([{ awake: true }, { awake: true }])
    expect([...wake.take()]).toEqual([])
    expect(await settled(sleeper(wake))).toEqual({ awake: false })
  })

  test('all_wakes_one_worker_and_hints_at_every_partition', async () => {
    const wake = quiet(3)
    const workers = [sleeper(wake), sleeper(wake)]
    wake.all()
    expect(await settled(workers)).toEqual([{ awake: true }, { awake: false }])
    expect([...wake.take()]).toEqual([0, 1, 2])
  })
})

describe('shared', () => {
  test('news_of_others_is_noted_and_wakes_nobody', async () => {
    const wake = quiet()
    wake.share(new Set([0, 1]))
    const worker = sleeper(wake)
    wake.news([2, 3])
    expect(await settled(worker)).toEqual({ awake: false })
    expect([...wake.takeNoted()]).toEqual([2, 3])
    expect([...wake.takeNoted()]).toEqual([])
    wake.news([1, 2])
    expect(await settled(worker)).toEqual({ awake: true })
    expect([...wake.take()]).toEqual([1])
  })

  test('what_was_hinted_at_goes_with_its_partition_to_the_other_sink', () => {
    const wake = new Wake(4)
    wake.share(new Set([0, 1]))
    expect([...wake.take()]).toEqual([0, 1])
    expect([...wake.takeNoted()]).toEqual([2, 3])
  })

  test('who_gets_a_partition_asks_for_it_at_once', async () => {
    const wake = quiet()
    wake.share(new Set([0]))
    wake.news([1])
    const worker = sleeper(wake)
    wake.share(new Set([0, 1]))
    expect(await settled(worker)).toEqual({ awake: true })
    expect([...wake.take()]).toEqual([1])
    expect([...wake.takeNoted()]).toEqual([])
    wake.share(undefined)
    expect([...wake.take()], 'the others are gone').toEqual([2, 3])
  })

  test('it_is_idle_only_while_a_worker_sleeps_and_nothing_is_to_be_asked', () => {
    const wake = quiet()
    expect(wake.isIdle).toBe(false)
    sleeper(wake)
    expect(wake.isIdle).toBe(true)
    wake.hint([0])
    expect(wake.isIdle).toBe(false)
  })
})
