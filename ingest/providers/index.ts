/** The providers that calltape understands. */
import type { Config } from '../../shared/config.js'
import { createElevenLabs } from './elevenlabs.js'
import { createExotel } from './exotel.js'
import { createJambonz } from './jambonz.js'
import { createLiveKit } from './livekit.js'
import { createPipecat } from './pipecat.js'
import { createPlivo } from './plivo.js'
import type { CreateProvider, Provider } from './provider.js'
import { createRetell } from './retell.js'
import { createTelnyx } from './telnyx.js'
import { createTwilio } from './twilio.js'
import { createVapi } from './vapi.js'
import { createVonage } from './vonage.js'

const ALL: CreateProvider[] = [
  createExotel,
  createTwilio,
  createVonage,
  createJambonz,
  createLiveKit,
  createPipecat,
  createVapi,
  createRetell,
  createElevenLabs,
  createTelnyx,
  createPlivo,
]

/** By their names in paths. */
export function createProviders(config: Config): Map<string, Provider> {
  return new Map(ALL.map((create) => create(config)).map((provider) => [provider.name, provider]))
}
